"""Whole validation sets in batches of several rows, every row once (`--full-validation`)."""

from argparse import Namespace
from collections.abc import Iterator

import numpy as np
from megatron.training import get_args

from megatron_let.errors import UsageError
from megatron_let.upstream.table import Redirect, instead


class WholeSet:
    """Megatron's sampler of this purpose, which gives one row at a time whatever the flags say.

    Every rank gives as many batches, of up to `--eval-micro-batch-size` rows: one that came to its
    end before the others would count its first rows twice.
    """

    def __init__(
        self, total_samples: int, data_parallel_rank: int, data_parallel_size: int
    ) -> None:
        own = np.arange(data_parallel_rank, total_samples, data_parallel_size)
        most = -(-total_samples // data_parallel_size)
        batches = np.array_split(own, -(-most // get_args().eval_micro_batch_size))
        self._batches = [batch.tolist() for batch in batches if len(batch)]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)


def fit_batches(args: Namespace, flags: Namespace) -> None:
    """Give `args` the batches of a whole set; `flags` are what the command line said.

    Ranks that pass tensors on expect one shape, so that there rows come one by one.
    """
    size = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    for name in ("eval_micro_batch_size", "eval_global_batch_size"):
        given = getattr(flags, name)
        if given is not None and (size > 1 or "global" in name):
            why = (
                "with tensor or pipeline parallelism rows come one by one"
                if size > 1
                else ("each data-parallel rank takes --eval-micro-batch-size rows at a time")
            )
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} {given} has no effect on --full-validation: {why}.")
    args.eval_micro_batch_size = 1 if size > 1 else args.eval_micro_batch_size
    # One micro-batch a step: of several Megatron reads the set as often.
    args.eval_global_batch_size = args.eval_micro_batch_size * args.data_parallel_size


_SAMPLERS = "megatron.training.datasets.data_samplers"
REDIRECTS = [
    Redirect(_SAMPLERS, "MegatronFullValidationSampler", instead(WholeSet), "a row at a time")
]
