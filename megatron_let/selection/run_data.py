"""The datasets of a run, built by a tool that is given the run's own flags."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from megatron.training import training

from megatron_let.methods.base import Method
from megatron_let.training import command_line
from megatron_let.training.run import Run
from megatron_let.upstream.mended import mend_megatron

PARALLELISM = {
    "--tensor-model-parallel-size": 1,
    "--pipeline-model-parallel-size": 1,
    "--context-parallel-size": 1,
    "--num-layers-per-virtual-pipeline-stage": 1,
    "--num-virtual-stages-per-pipeline-rank": 1,
    "--decoder-first-pipeline-num-layers": 1,
    "--decoder-last-pipeline-num-layers": 1,
    "--expert-model-parallel-size": 1,
    "--expert-tensor-parallel-size": 1,
    "--sequence-parallel": 0,
    "--use-distributed-optimizer": 0,
}
"""Flags of a run, with the number of their values, that its data do not depend on."""


def without_parallelism(words: Sequence[str]) -> list[str]:
    """The run's flags without those of its layout: every process here reads all of the data."""
    kept, skip = [], 0
    for word in words:
        if skip:
            skip -= 1
            continue
        flag, equals, _ = word.partition("=")
        if flag in PARALLELISM:
            skip = 0 if equals else PARALLELISM[flag]
            continue
        kept.append(word)
    return kept


def parse_run(prog: str, flags: Sequence[str]) -> Namespace:
    """Megatron's arguments of a run with these flags, without its layout.

    Raises:
        UsageError: the flags are not those of a run.
    """
    sys.argv = [prog, *without_parallelism(flags)]
    mend_megatron()
    return command_line.parse_arguments()


def build_datasets(args: Namespace) -> tuple[Any, Any, Any]:
    """Train, validation and test datasets as the run will build them, cached as it will look."""
    model_config = command_line.model_config(args, Method(args))
    training.initialize_megatron(get_embedding_ranks=command_line.embedding_ranks(args))
    run = Run(args, model_config, Method(args))
    return run.build_datasets(training.get_train_valid_test_num_samples())
