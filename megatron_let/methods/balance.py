"""A weight that sets itself: the alignment's gradient as large as a part of the language model's.

At layer K the two gradients are at hand. The alignment's falls with the length of the student's
states, which grow and differ from model to model: a weight that suits one is nothing to another.
Their ratio is free of that.
"""

from typing import Any

import torch

MEMORY = 0.95
"""Of the moving averages: some twenty steps."""
LARGEST = 1e4
"""Weight."""


def averaged(
    old: torch.Tensor, new: torch.Tensor, counts: torch.Tensor, every: int = 1
) -> torch.Tensor:
    """The moving average with one value more, if that counts; NaN: nothing is known yet.

    There is one in `every` steps.
    """
    kept = MEMORY**every
    merged = torch.where(old.isnan(), new, kept * old + (1 - kept) * new)
    return torch.where(counts, merged, old)


class Balance:
    """lambda(s) = ratio * sqrt(EMA |g_LM|^2 / EMA |g_LET|^2 at weight 1), on the device.

    Made of what all ranks have summed up together in the steps before, so the same everywhere, and
    nothing waits for it.

    Args:
        ratio: |g_LET| / |g_LM| that is wanted.
        first: weight of the first step, when nothing is known.
    """

    def __init__(self, ratio: float, first: float) -> None:
        self._ratio, self._first = ratio, first
        self._squares_2: torch.Tensor | None = None
        """Moving averages of |g_LM|^2 and |g_LET|^2 at weight 1; NaN: nothing is known yet."""

    def weight(self, device: torch.device) -> torch.Tensor:
        """Of the coming step, a scalar, without its course over the run."""
        lm, let = self._known(device)
        found = (self._ratio * (lm / let).sqrt()).clamp(max=LARGEST)
        return torch.where(found.isnan(), self._first, found)

    def update(self, lm_square: torch.Tensor, let_square: torch.Tensor) -> None:
        """Take in a step: sums over all ranks, the second at weight 1; scalars.

        One that is zero or not finite leaves everything as it was.
        """
        new_2 = torch.cat([lm_square.view(1), let_square.view(1)])
        old_2 = self._known(new_2.device)
        self._squares_2 = averaged(old_2, new_2, (new_2.isfinite() & (new_2 > 0)).all())

    def _known(self, device: torch.device) -> torch.Tensor:
        if self._squares_2 is None:
            self._squares_2 = torch.full((2,), torch.nan, device=device)
        return self._squares_2.to(device)

    def state(self) -> dict[str, Any]:
        """What a checkpoint carries; waits for the device."""
        return {} if self._squares_2 is None else {"squares": self._squares_2.tolist()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's."""
        if "squares" in state:
            self._squares_2 = torch.tensor(state["squares"])
