"""Resuming: a run goes on as it began, or the user hears why it cannot.

Megatron compares the student's shape with the checkpoint's and knows nothing of our flags.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from megatron_let.checkpoint.door import Door
from megatron_let.errors import UsageError
from megatron_let.methods.base import Method
from megatron_let.methods.table import BASELINE
from megatron_let.training.arguments import InitFlags, groups
from megatron_let.training.resume_flags import check_flags
from megatron_let.upstream.loop_hooks import LoopHooks

REMOVED = {"let_resize_side": "teacher", "kd_temperature_side": "teacher"}
"""Arguments that older checkpoints hold, and the only value that this version still means."""


def resume_check(
    door: Door, hooks: LoopHooks, args: Namespace, method: Method
) -> Callable[[list[Any]], list[Any]]:
    """Return the hook that Megatron calls before it loads: on every rank, with the groups there."""

    def check(chunks: list[Any]) -> list[Any]:
        door.settle(args)
        saved = door.saved_args(args)
        if saved is not None:
            check_resume(args, saved, method)
            if not args.finetune:
                hooks.on_load(saved)
        return chunks

    return check


def check_resume(args: Namespace, saved: Namespace, method: Method) -> None:
    """Compare this run with the one that saved the checkpoint of `--load`, by its arguments.

    Another method may go on from a checkpoint; the same one must go on with the same flags.

    Raises:
        UsageError: naming both values and the way out.
    """
    method.check_checkpoint(saved)
    if args.finetune:  # a run of its own, which takes the weights only
        return check_flags(args, saved)
    saved_method = vars(saved).get("method", BASELINE)  # Megatron-LM's own checkpoints have none
    _check_init(args, saved)
    if saved_method == args.method:
        _check_flags(args, saved, method)
    elif os.environ.get("RANK", "0") == "0":
        print(f"> --method {args.method} goes on from a checkpoint of --method {saved_method}")
    return check_flags(args, saved)


def _check_init(args: Namespace, saved: Namespace) -> None:
    """The flags of growth stay on a requeued command line; then they must be those of its start."""
    names = [field.name for field in fields(InitFlags)] if args.init_from else []
    for name in names:
        value, before = vars(args)[name], vars(saved).get(name)
        if value != before:
            raise UsageError(
                f"This run has {_flag(name, value)}, but the checkpoint in {args.load} began with "
                f"{_flag(name, before)}, and goes on from its own weights. Leave it out, or start "
                "a new run with another --save and without --load."
            )


def _check_flags(args: Namespace, saved: Namespace, method: Method) -> None:
    for name, kept in REMOVED.items():
        before = vars(saved).get(name, kept)
        if before != kept:
            raise UsageError(
                f"The checkpoint in {args.load} was saved with {_flag(name, before)}, which this "
                "version has no more. Resume with the version that saved it, or start a new run "
                "from its weights: --finetune, with another --save."
            )
    given = {word.partition("=")[0] for word in sys.argv}
    defaults = {field.name: field.default for g in groups().values() for field in fields(g)}
    for name in method.same_on_resume:
        if name not in saved and _flag(name, None).split()[-1] not in given:
            continue  # older code's, which did what is the default now
        value, before = vars(args)[name], vars(saved).get(name, defaults[name])
        if value != before:
            raise UsageError(
                f"This run has {_flag(name, value)}, the checkpoint in {args.load} was saved with "
                f"{_flag(name, before)}. Resume with the checkpoint's, or start a new run from "
                "its weights: --finetune, with another --save."
            )


def _flag(name: str, value: object) -> str:
    flag = f"--{name.replace('_', '-')}"
    return f"no {flag}" if value is None else f"{flag} {value}"
