"""`--guidance auto`: what a user would otherwise tune, in one flag.

The constants are of one small size and two regimes (docs/study.md), and were fixed before any other
cell was run: docs/methods.md says what each rests on.
"""

from argparse import Namespace
from collections.abc import Collection
from typing import Any

from megatron_let.errors import UsageError
from megatron_let.methods.ending import PATIENCE
from megatron_let.methods.schedules import run_length
from megatron_let.methods.table import method_row

STOP_SHARE = 0.5
"""Of the run, after which no teacher guides."""
RATIO = 0.5
"""Of the alignment's gradient to the language model's, at the first step."""


def choose(args: Namespace, given: Collection[str]) -> None:
    """Fill in what `--guidance auto` chooses; `given` are the words of the command line.

    What is given stays. Raises UsageError where there is nothing to choose, or no end to know.
    """
    row = method_row(args.method)
    if row.distils_to_the_end:
        raise UsageError(
            f"--guidance auto ends the guidance, and --method {args.method} distils during the "
            "whole run: use --method salt, or leave --guidance out."
        )
    if not (row.aligns or row.distils):
        raise UsageError(f"--guidance auto knows nothing to choose for --method {args.method}.")
    words = {word.partition("=")[0].removeprefix("--").removeprefix("no-") for word in given}

    if row.aligns and args.let_resize == "linear" and "let-weight-rule" not in words:
        raise UsageError(
            "--guidance auto would have the weight follow the gradients, which rises without end "
            "beside --let-resize linear, a map that meets the student (docs/study.md). Use "
            "--let-resize interpolate, or give --let-weight-rule fixed."
        )

    def fill(name: str, value: Any) -> None:
        if name.replace("_", "-") not in words:
            setattr(args, name, value)

    if row.aligns:
        fill("let_weight_rule", "ratio")
        if args.let_weight_rule == "ratio":
            fill("let_gradient_ratio", RATIO)
    if row.distils:
        fill("kd_token_gate", True)
        fill("guidance_stop", "loss")
    stops = ["let_stop_step"] * (row.aligns and args.let_decay != "constant")
    stops += ["kd_stop_step"] * row.distils
    steps = run_length(args)
    if steps is None and not (args.train_samples and args.global_batch_size is None):
        if missing := [name for name in stops if getattr(args, name) is None]:
            flag = missing[0].replace("_", "-")
            raise UsageError(f"--guidance auto needs the run's length: --train-iters, or --{flag}.")
    if steps is not None:  # else Megatron fills in the batch, and comes back
        stop = max(1, round(STOP_SHARE * steps))
        for name in stops:
            fill(name, stop)
        if args.guidance_stop != "step":
            fill("guidance_patience", min(PATIENCE, stop))


def choices(args: Namespace) -> str:
    """Return what counts in the end, as flags."""
    row = method_row(args.method)
    names = ["let_weight_rule", "let_stop_step"] * row.aligns
    names += ["let_gradient_ratio"] * (row.aligns and args.let_weight_rule == "ratio")
    names += ["kd_token_gate", "kd_stop_step"] * row.distils
    names += ["guidance_stop", "guidance_patience"] * (args.guidance_stop != "step")
    found = ((name, getattr(args, name)) for name in names)
    return " ".join(
        f"--{name.replace('_', '-')}" + f" {value}" * (value is not True)
        for name, value in found
        if value not in (None, False)
    )
