"""What a dry run finds."""

from dataclasses import dataclass, field


@dataclass
class Found:
    """What one rank holds, in bytes, and does in its second step."""

    rank: int
    stage: int
    parameters: int = 0
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0  # and what else there is before a step
    teacher: int = 0
    step: int = 0  # at the step's fullest moment, beside what was there before
    flops: float = 0.0
    teacher_flops: float = 0.0
    reads: int = 0
    """How often the host asks for contents of a tensor, which waits for a GPU if it lies there."""
    collectives: list[tuple[str, str, int, int]] = field(default_factory=list)
    """Group, kind, number and bytes of each kind."""
    seconds: float = 0.0

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment of a step."""
        return self.weights + self.gradients + self.optimizer + self.teacher + self.step
