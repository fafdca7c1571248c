"""A teacher's states in its student's width. Shapes: S sequence, B batch, H student, T teacher."""

import torch
import torch.nn.functional as F


def interpolate(states_SBH: torch.Tensor, width: int) -> torch.Tensor:
    """1-D linear interpolation along the feature axis, `[S, B, width]` (method.md, 2.4)."""
    if states_SBH.size(-1) == width:
        return states_SBH
    return F.interpolate(states_SBH, size=width, mode="linear", align_corners=False)


class Resize(torch.nn.Module):
    """`[S, B, T]` to `[S, B, H]`; a `linear` one owns its map, the only weights LET ever trains.

    The map starts from a generator of its own, so that a run with it and a run without draw the
    same student weights, and every tensor-parallel rank the same map.

    Args:
        kind: `interpolate` (no parameters) or `linear` (a learned map).
        student_width: H.
        teacher_width: T.
    """

    def __init__(self, kind: str, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self._width = student_width
        self.weight: torch.nn.Parameter | None = None
        if kind == "linear":
            generator = torch.Generator().manual_seed(0)
            weight_HT = torch.randn(student_width, teacher_width, generator=generator)
            self.weight = torch.nn.Parameter(weight_HT / teacher_width**0.5)

    def forward(self, teacher_SBT: torch.Tensor) -> torch.Tensor:
        """Return the teacher's states in the student's width."""
        if self.weight is not None:
            return F.linear(teacher_SBT.to(self.weight.dtype), self.weight)
        return interpolate(teacher_SBT, self._width)
