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
ALIGNED = {"let_weight_rule": "ratio", "let_gradient_ratio": 0.5}
DISTILLED = {"kd_token_gate": True, "guidance_stop": "loss"}


def choose(args: Namespace, given: Collection[str]) -> None:
    """Fill in what `--guidance auto` chooses; `given` are the words of the command line.

    What is given stays. Raises UsageError where there is nothing to choose, or no end to know.
    """
    row, chosen = method_row(args.method), dict[str, Any]()
    if row.distils_to_the_end:
        raise UsageError(
            f"--guidance auto ends the guidance, and --method {args.method} distils during the "
            "whole run: use --method salt, or leave --guidance out."
        )
    if row.distils and args.kd_temperature != 1:
        raise UsageError(
            f"--guidance auto compares losses at a temperature of 1, not --kd-temperature "
            f"{args.kd_temperature}. Remove one of the two."
        )
    if (steps := run_length(args)) is None:
        raise UsageError("--guidance auto needs the run's length in steps: give --train-iters.")
    stop = max(1, round(STOP_SHARE * steps))
    if row.aligns:
        chosen |= ALIGNED | ({} if args.let_decay == "constant" else {"let_stop_step": stop})
    if row.distils:
        chosen |= DISTILLED | {"kd_stop_step": stop, "guidance_patience": min(PATIENCE, stop)}
    if not chosen:
        raise UsageError(f"--guidance auto knows nothing to choose for --method {args.method}.")
    words = {word.partition("=")[0].removeprefix("--").removeprefix("no-") for word in given}
    for name, value in chosen.items():
        if name.replace("_", "-") not in words:
            setattr(args, name, value)


def choices(args: Namespace) -> str:
    """Return what it chose or found given, as flags."""
    row = method_row(args.method)
    names = [*ALIGNED, "let_stop_step"] * row.aligns
    names += [*DISTILLED, "kd_stop_step", "guidance_patience"] * row.distils
    found = {name.replace("_", "-"): getattr(args, name) for name in names}
    return " ".join(f"--{k}" + f" {v}" * (v is not True) for k, v in found.items())
