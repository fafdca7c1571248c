"""Guidance that ends itself: by what is measured at its loss, never by a jump.

`loss`: the student's loss has come down to the teacher's on the same tokens. `cosine`: the two
gradients at the aligned layer point apart. What all ranks have summed up together is judged on the
device, copied without waiting, and read after the next step: a fixed lag, the same in every run.
"""

import math
from argparse import Namespace
from typing import Any

import torch

from megatron_let.errors import UsageError
from megatron_let.methods.balance import averaged
from megatron_let.methods.schedules import run_length, schedule_samples

WORDS = {
    "loss": "the student's loss less the teacher's has come down to {:.4f}",
    "cosine": "the cosine between the two gradients at the aligned layer is {:.4f}",
}
MARGIN, PATIENCE, RAMP = 0.0, 20, 50
NAMES = ("guidance_stop", "guidance_margin", "guidance_patience", "guidance_ramp")


def check_ending(args: Namespace, measures: set[str]) -> None:
    """Check `--guidance-*`; `measures` are the rules that the method's signals can follow.

    Raises:
        UsageError: naming the flag.
    """
    rule = args.guidance_stop
    if rule == "step":
        for name, default in zip(NAMES[1:], (MARGIN, PATIENCE, RAMP), strict=True):
            if getattr(args, name) != default:
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} has no effect without --guidance-stop loss or cosine.")
        return
    if rule not in measures:
        raise UsageError(
            f"--guidance-stop {rule} needs LET: --method let, or let+salt; --method {args.method} "
            "measures nothing that it could follow."
        )
    if rule == "loss" and args.kd_temperature != 1:
        raise UsageError(
            f"--guidance-stop loss compares losses at a temperature of 1, and --kd-temperature "
            f"{args.kd_temperature} gives the teacher another one. Remove one of the two."
        )
    if not math.isfinite(args.guidance_margin):
        raise UsageError(f"--guidance-margin {args.guidance_margin} is no number to come down to.")
    patience, ramp = args.guidance_patience, args.guidance_ramp
    if min(patience, ramp) < 1 or patience > (run_length(args) or patience):
        raise UsageError(
            f"--guidance-patience {patience} and --guidance-ramp {ramp} must be at least 1, and "
            "the patience no longer than the run."
        )


class Ending:
    """Follows one measure, step by step.

    Args:
        args: the checked command line, `--guidance-*`.
    """

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self._of = [args.method, args.guidance_stop]
        *_, self._warm_up = schedule_samples(args)
        """Samples of the learning rate's, in which nothing is judged: gradients mean little yet."""
        self._average: torch.Tensor | None = None
        self._is_low: torch.Tensor | None = None
        """Of the step before, on its way to the host."""
        self._copied: torch.cuda.Event | None = None
        self._patience = 0
        self._since: int | None = None
        """Steps that were made when the weights began to fall."""

    def factor(self, step: int) -> float:
        """Of all weights after `step` steps."""
        if self._since is None or step < self._since:
            return 1.0
        return max(0.0, 1.0 - (step - self._since + 1) / self._args.guidance_ramp)

    def learn(self, step: int, value: torch.Tensor, every: int = 1) -> str | None:
        """Take in the measure of a step, equal on all ranks.

        Args:
            step: steps that were made.
            value: a scalar; one that is not finite changes nothing.
            every: so many steps lie between two that are finite.

        Returns:
            What happened, in the step in which the weights begin to fall.
        """
        if self._is_low is not None:
            self._patience = self._patience + 1 if self._read() else 0
        new = value.detach().float().view(())
        old = torch.full_like(new, torch.nan) if self._average is None else self._average
        new = self._average = averaged(old.to(new.device), new, new.isfinite(), every)
        is_low = new <= self._args.guidance_margin
        is_warm = self._args.consumed_train_samples > self._warm_up
        self._copy(is_low if is_warm else torch.zeros_like(is_low))
        if self._since is None and self._patience >= self._args.guidance_patience:
            self._since = step
            what = WORDS[self._args.guidance_stop].format(new.item())
            return f"step {step:,}: {what} (moving average)"
        return None

    def _copy(self, is_low: torch.Tensor) -> None:
        if not is_low.is_cuda:
            self._is_low = is_low
            return
        self._is_low = torch.empty((), dtype=torch.bool, pin_memory=True)
        self._is_low.copy_(is_low, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def _read(self) -> bool:
        if self._copied is not None:
            self._copied.synchronize()  # a step ago
        return bool(self._is_low)

    def state(self) -> dict[str, Any]:
        """What a checkpoint carries."""
        if self._average is None:
            return {}
        return {
            "of": self._of,
            "average": self._average.item(),
            "low": None if self._is_low is None else self._read(),
            "patience": self._patience,
            "since": self._since,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's; that of another method or rule means nothing here."""
        if state.get("of") == self._of:
            self._average = torch.tensor(state["average"])
            self._is_low = None if state["low"] is None else torch.tensor(state["low"])
            self._patience, self._since = state["patience"], state["since"]
