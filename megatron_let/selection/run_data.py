"""The datasets of a run, built by a tool that is given the run's own flags."""

import argparse
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from megatron.training import training

from megatron_let.methods.base import Method
from megatron_let.training import command_line
from megatron_let.training.run import Run
from megatron_let.upstream.mended import mend_megatron

LAYOUT = (
    "--tensor-model-parallel-size --pipeline-model-parallel-size --context-parallel-size "
    "--num-layers-per-virtual-pipeline-stage --num-virtual-stages-per-pipeline-rank "
    "--decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers "
    "--expert-model-parallel-size --expert-tensor-parallel-size"
).split()
LAYOUT_SWITCHES = ("--sequence-parallel", "--use-distributed-optimizer")
"""Flags of a run that its data do not depend on."""


def parse_run(prog: str, flags: Sequence[str]) -> Namespace:
    """Megatron's arguments of a run with these flags; UsageError if they are not those of one.

    Those of its layout are left out: every process here reads all of the data.
    """
    layout = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in LAYOUT:
        layout.add_argument(flag)
    for flag in LAYOUT_SWITCHES:
        layout.add_argument(flag, action="store_true")
    sys.argv = [prog, *layout.parse_known_args(flags)[1]]
    mend_megatron()
    return command_line.parse_arguments()


def build_datasets(args: Namespace) -> tuple[Any, Any, Any]:
    """Train, validation and test datasets as the run will build them, cached as it will look."""
    model_config = command_line.model_config(args, Method(args))
    training.initialize_megatron(get_embedding_ranks=command_line.embedding_ranks(args))
    run = Run(args, model_config, Method(args))
    return run.build_datasets(training.get_train_valid_test_num_samples())
