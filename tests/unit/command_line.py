"""Run in a worker: command lines up to the point where the model would be built."""

import argparse
import contextlib
import inspect
import io
import os
import sys
from typing import Any

from megatron.training import training
from megatron.training.arguments import add_megatron_arguments

from megatron_let.errors import UsageError
from megatron_let.methods import distill, let
from megatron_let.methods.table import build_method
from megatron_let.training import arguments, command_line, ignored_flags, resume
from megatron_let.training.log import count_parameters
from megatron_let.upstream.mended import mend_megatron
from tests.support.testing import forget_last_run

MODEL = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 "
    "--max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 2 --lr 1e-3 "
    "--tokenizer-type NullTokenizer --vocab-size 255 --make-vocab-size-divisible-by 8 "
    "--eval-iters 0 --cpu"
).split()


REFUSED_FLAGS = let.Let.refused_flags | distill.Distill.refused_flags


def usage_errors(command_lines: list[list[str]]) -> list[str]:
    """The message with which each command line ends; empty if it is fine."""
    return [usage_error(flags) for flags in command_lines]


def usage_error(flags: list[str]) -> str:
    """The message of one command line; anything but a usage error is raised."""
    training.destroy_global_state()
    model = MODEL[: MODEL.index("--eval-iters")] if "--full-validation" in flags else MODEL
    sys.argv = ["pretrain_let.py", *model, "--cpu", *flags]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            args = command_line.parse_arguments()
        command_line.pretrain_config(args, command_line.model_config(args, build_method(args)))
    except UsageError as error:
        return str(error)
    except SystemExit:  # argparse's own
        return printed.getvalue()
    return ""


def connections(flags: list[str]) -> str | None:
    """`CUDA_DEVICE_MAX_CONNECTIONS` as a command line leaves it, be it right or wrong."""
    os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    usage_error(flags)
    return os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)


def aligned_layers(flags: list[str]) -> tuple[int, int]:
    """Numbers of the student's and the teacher's layer that a command line aligns."""
    training.destroy_global_state()
    sys.argv = ["pretrain_let.py", *MODEL, *flags]
    args = command_line.parse_arguments()
    build_method(args)
    return args.let_layer, args.let_teacher_layer


def parser_facts() -> dict[str, Any]:
    """The whole help text, and what the parser knows of the flags that we refuse."""
    parser = argparse.ArgumentParser(prog="pretrain_let.py", allow_abbrev=False)
    arguments.add_arguments(add_megatron_arguments(parser))
    flags = {action.dest: (action.option_strings, action.default) for action in parser._actions}
    ours = {f for group in arguments.groups() for f in inspect.get_annotations(group)}
    return {
        "help": parser.format_help(),
        "flags": {name: flags[name] for name in flags if name in REFUSED_FLAGS},
        "refused": REFUSED_FLAGS,
        "unsupported": ignored_flags.UNSUPPORTED.split(),
        "options": [option for options, _ in flags.values() for option in options],
        "ours": sorted(ours),
        "compared": resume.SHAPES
        + resume.FUNCTION
        + resume.OPTIMIZER
        + resume.SCHEDULED
        + resume.CHANGEABLE
        + resume.OPTIMIZERS_OWN,
        "known": sorted(flags),
    }


def signatures() -> dict[str, list[str]]:
    """Parameters of the functions of Megatron that a run log wraps."""
    functions = (training.training_log, training.evaluate, training.save_checkpoint)
    return {f.__name__: list(inspect.signature(f).parameters) for f in functions}


def number_of_parameters(flags: list[str]) -> int:
    """Build a student and count it."""
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    forget_last_run()
    mend_megatron()
    steps = "--mock-data --train-iters 10 --eval-interval 5".split()
    sys.argv = ["pretrain_let.py", *MODEL, *steps, *flags]
    args = command_line.parse_arguments()
    config = command_line.model_config(args, build_method(args))
    training.initialize_megatron(get_embedding_ranks=command_line.embedding_ranks(args))
    chunks, _, _ = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, config),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    return count_parameters(chunks)


def train(flags: list[str]) -> str:
    """Run `pretrain_let.py` to its end; return what it printed."""
    from megatron_let import pretrain as pretrain_let

    forget_last_run()
    sys.argv = ["pretrain_let.py", *MODEL, "--mock-data", *flags]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        pretrain_let.main()
    return printed.getvalue()
