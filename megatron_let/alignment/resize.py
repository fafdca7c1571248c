"""Bringing student and teacher to one width. Shapes: S sequence, B batch, H student, T teacher."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class ResizeConfig:
    """Which side is resized to the other's width, and how."""

    kind: str
    """`interpolate` (no parameters) or `linear` (a learned map)."""
    side: str
    """`teacher` or `student`: whose states are resized."""
    student_width: int
    teacher_width: int

    @property
    def shape(self) -> tuple[int, int]:
        """Output and input width of the resized side."""
        widths = (self.student_width, self.teacher_width)
        return widths if self.side == "teacher" else widths[::-1]


def interpolate(states_SBH: torch.Tensor, width: int) -> torch.Tensor:
    """1-D linear interpolation along the feature axis, `[S, B, width]` (method.md, 2.4)."""
    if states_SBH.size(-1) == width:
        return states_SBH
    return F.interpolate(states_SBH, size=width, mode="linear", align_corners=False)


class Resize(torch.nn.Module):
    """Resizes one side; with kind `linear` it owns the map, the only weights LET ever trains.

    The map starts from a generator of its own, so that a run with it and a run without draw the
    same student weights, and every tensor-parallel rank the same map.
    """

    def __init__(self, config: ResizeConfig) -> None:
        super().__init__()
        self.config = config
        if config.kind == "linear":
            generator = torch.Generator().manual_seed(0)
            weight = torch.randn(config.shape, generator=generator) / config.shape[1] ** 0.5
            self.weight = torch.nn.Parameter(weight)

    def forward(
        self, student_SBH: torch.Tensor, teacher_SBT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both at one width; the side that is not resized comes back as it is."""
        if self.config.side == "teacher":
            return student_SBH, self._resize(teacher_SBT)
        return self._resize(student_SBH), teacher_SBT

    def _resize(self, states: torch.Tensor) -> torch.Tensor:
        if self.config.kind == "linear":
            return F.linear(states.to(self.weight.dtype), self.weight)
        return interpolate(states, self.config.shape[0])
