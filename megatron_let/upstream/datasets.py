"""Megatron's data sets, which say what they cannot train on, execute no file, and are whole.

With `--full-validation` whole sets come in batches of several rows, every row once.
"""

import importlib.util
from argparse import Namespace
from collections.abc import Callable
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets import gpt_dataset
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import get_args

from megatron_let.errors import UsageError
from megatron_let.upstream.table import Redirect, alike, around, instead


class GPTDataset(gpt_dataset.GPTDataset):
    """Upstream's; of the same name, which is part of the keys of cached indices."""

    def _get_num_epochs(self, num_tokens_per_epoch: int) -> int:
        """Upstream counts epochs until there are enough tokens: of none, or of three, for ever."""
        if num_tokens_per_epoch <= self.config.sequence_length:
            raise UsageError(
                f"{self.dataset_path} holds {num_tokens_per_epoch} tokens for "
                f"{self.index_split.name}, which is no sample of --seq-length "
                f"{self.config.sequence_length}. Give more documents, or another --split; without "
                "validation: --eval-iters 0."
            )
        return super()._get_num_epochs(num_tokens_per_epoch)


def _load_index(path: str, **_: Any) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (EOFError, OSError, ValueError) as error:
        raise UsageError(
            f"{path} is no index of samples ({error}). Remove {Path(path).parent}: it is made anew."
        ) from error


@around
def _unless_built(compile_helpers: Callable[[], None]) -> None:
    """The wheel brings them and no makefile, so upstream's call would end the run."""
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        compile_helpers()


def whole_set(
    total_samples: int, data_parallel_rank: int, data_parallel_size: int
) -> list[tuple[int | None, ...]]:
    """Megatron's sampler of this purpose, which gives one row at a time whatever the flags say.

    Every rank gives as many batches of `--eval-micro-batch-size` rows, since ranks may pass tensors
    of one shape on, and one that came to its end before the others would begin anew. What is
    missing is None: a row of the data set without a token that counts. (An expert's capacity, where
    it has one, is shared by a batch: the loss then depends on the rows of each, missing ones too.)
    """
    rows = get_args().eval_micro_batch_size
    own = list(range(data_parallel_rank, total_samples, data_parallel_size))
    batches = -(-total_samples // (rows * data_parallel_size))
    missing = batches * rows - len(own)
    return list(batched([*own, *[None] * missing], rows))


def whole_set_batches(args: Namespace) -> dict[str, int]:
    """Return what Megatron's `--eval-global-batch-size` must be, of a parsed command line."""
    rows = args.eval_micro_batch_size or args.micro_batch_size
    # For now a multiple of what it will be; without rows Megatron says what is missing.
    return {} if rows is None else {"eval_global_batch_size": rows * args.world_size}


def check_whole_sets(args: Namespace) -> None:
    """Have one micro-batch a step, since of several Megatron reads a set as often.

    `args` are Megatron's, of which a checkpoint may have changed the ranks. Raises UsageError for
    virtual stages, where Megatron takes the chunks for sets.
    """
    args.eval_global_batch_size = args.eval_micro_batch_size * args.data_parallel_size
    if args.virtual_pipeline_model_parallel_size is not None:
        raise UsageError(
            "--full-validation does not go with virtual pipeline stages: give --eval-iters "
            "instead of it, or leave the virtual stages out."
        )


@around
def _knowing_no_length(evaluate_and_print: Any, *args: Any, **kwargs: Any) -> None:
    """A stage between the first and the last one has no set, and sends its length for None."""
    if get_args().full_validation:
        get_args().eval_iters = [length or 0 for length in get_args().eval_iters]
    evaluate_and_print(*args, **kwargs)


@around
def _with_what_is_left(count: Callable[[], tuple[int, int | None, int]]) -> Any:
    """Samples that were seen and those that are left, where these are more than upstream counts.

    It takes all of a run for of this command's batches and evaluations; and leaves one evaluation
    out where `--start-eval-at-iter` is one of them, and the last of all.
    """
    train, valid, test = count()
    args = get_args()
    if args.skip_train:
        return train, valid, test
    done = getattr(args, "iteration", 0)  # a tool has none
    if not args.train_samples:
        steps = max(args.train_iters - done, 0)
        train = max(train, args.consumed_train_samples + steps * args.global_batch_size)
    if valid is not None and args.eval_iters:
        before = max(done, (args.start_eval_at_iter or 1) - 1) // args.eval_interval
        evaluations = max(args.train_iters // args.eval_interval - before, 0) + 1
        rows = evaluations * args.eval_iters * args.eval_global_batch_size
        valid = max(valid, args.consumed_valid_samples + rows)
    return train, valid, test


@around
def _of_a_complete_run(load: Callable[..., Any], dataset: Any, consumed: int) -> Any:
    """Upstream refuses to load where no sample is left, though a complete run asks for none."""
    args = get_args()
    is_complete = not args.skip_train and args.iteration >= args.train_iters
    if is_complete and dataset is not None and consumed >= len(dataset):
        consumed = 0
    return load(dataset, consumed)


def _leave_out_a_step(data_iterator: Any) -> None:
    """`dummy_train_step` of `--iterations-to-skip`: each chunk that reads data draws its own.

    Upstream knows one iterator a rank: virtual stages have a list of them, and of a stage that
    reads nothing it draws, too.
    """
    iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
    machine = get_rerun_state_machine()
    while machine.should_run_forward_backward(data_iterator):
        for iterator in filter(None, iterators):
            for _ in range(get_num_microbatches()):
                next(iterator)


@around
def _with_missing_rows(get: Any, blend: Any, index: int | None) -> Any:
    """A blend's row that does not count, as the data sets that it is made of have one."""
    if index is not None:
        return get(blend, index)
    row = get(blend, 0)
    return row | {"loss_mask": torch.zeros_like(row["loss_mask"])}


_DATASETS, _LOOP = "megatron.core.datasets", "megatron.training.training"
_CACHED = f"{_DATASETS}.gpt_dataset {_DATASETS}.blended_dataset"
_BLEND = f"{_DATASETS}.blended_dataset.BlendedDataset"
_SAMPLERS, _SAMPLER = "megatron.training.datasets.data_samplers", "MegatronFullValidationSampler"
PREBUILT_HELPERS = Redirect(
    f"{_DATASETS}.utils", "compile_helpers", _unless_built, "there is no makefile"
)
REDIRECTS = [
    PREBUILT_HELPERS,
    *alike(_CACHED, "safe_numpy_load", instead(_load_index), "takes some pickles for arrays"),
    Redirect(_SAMPLERS, _SAMPLER, instead(whole_set), "a row at a time"),
    Redirect(_BLEND, "__getitem__", _with_missing_rows, "knows no missing row"),
    Redirect(
        _LOOP, "get_train_valid_test_num_samples", _with_what_is_left, "counts too few on a resume"
    ),
    Redirect(_LOOP, "build_pretraining_data_loader", _of_a_complete_run, "refuses complete runs"),
    Redirect(_LOOP, "dummy_train_step", instead(_leave_out_a_step), "knows one iterator a rank"),
    Redirect(_LOOP, "evaluate_and_print_results", _knowing_no_length, "None for a length"),
]
