"""The datasets of a run, built by a tool that is given the run's own flags."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from megatron.training import training

from megatron_let.methods.base import Method
from megatron_let.program import TRACKERS, named, without
from megatron_let.training import command_line
from megatron_let.training.run import Run
from megatron_let.upstream.mended import mend_megatron

LEFT_OUT = named(
    "account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split "
    "context-parallel-size decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers "
    "defer-embedding-wgrad-compute distribute-saved-activations expert-model-parallel-size "
    "expert-tensor-parallel-size microbatch-group-size-per-virtual-pipeline-stage "
    "num-distributed-optimizer-instances num-layers-per-virtual-pipeline-stage "
    "num-virtual-stages-per-pipeline-rank overlap-param-gather "
    "overlap-param-gather-with-optimizer-step pipeline-model-parallel-layout "
    "pipeline-model-parallel-size sequence-parallel tensor-model-parallel-size tp-comm-overlap "
    f"use-distributed-optimizer {TRACKERS}"
)
"""Flags of a run that its data do not depend on, and that one process could not follow."""


def parse_run(prog: str, flags: Sequence[str]) -> Namespace:
    """Megatron's arguments of a run with these flags; UsageError if they are not those of one.

    Those of its layout and its trackers are left out: every process here reads all of the data,
    and writes nothing into the run's folder.
    """
    sys.argv = [prog, *without(flags, LEFT_OUT)]
    mend_megatron()
    return command_line.parse_arguments(tracks=False)


def build_datasets(args: Namespace) -> tuple[Any, Any, Any]:
    """Train, validation and test datasets as the run will build them, cached as it will look."""
    model_config = command_line.model_config(args, Method(args))
    training.initialize_megatron(get_embedding_ranks=command_line.embedding_ranks(args))
    run = Run(args, model_config, Method(args))
    return run.build_datasets(training.get_train_valid_test_num_samples())
