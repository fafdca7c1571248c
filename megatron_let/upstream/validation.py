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


def whole_set_batches(args: Namespace) -> dict[str, int]:
    """Return what Megatron's `--eval-*-batch-size` must be, of a parsed command line.

    Ranks that pass tensors on expect one shape, so that there rows come one by one. Raises
    UsageError if the command line wants something else.
    """
    size = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    for name, why in (
        ("micro", size > 1 and "with tensor or pipeline parallelism rows come one by one"),
        ("global", "each data-parallel rank takes --eval-micro-batch-size rows at a time"),
    ):
        given = getattr(args, f"eval_{name}_batch_size")
        if given is not None and why:
            flag = f"--eval-{name}-batch-size {given}"
            raise UsageError(f"{flag} has no effect on --full-validation: {why}. Leave it out.")
    rows = 1 if size > 1 else args.eval_micro_batch_size or args.micro_batch_size
    ranks = max(1, args.world_size // (size * args.context_parallel_size))
    # One micro-batch a step: of several Megatron reads the set as often.
    return {"eval_micro_batch_size": rows, "eval_global_batch_size": rows * ranks}


_SAMPLERS = "megatron.training.datasets.data_samplers"
REDIRECTS = [
    Redirect(_SAMPLERS, "MegatronFullValidationSampler", instead(WholeSet), "a row at a time")
]
