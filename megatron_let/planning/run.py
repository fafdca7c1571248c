"""What is run, how the teacher takes part in it, and on which GPUs."""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from megatron_let.errors import UsageError
from megatron_let.methods import table
from megatron_let.planning.layout import Layout


class Phase(NamedTuple):
    """Steps in which the teacher does the same."""

    steps: int
    aligns: bool
    distils: bool


@dataclass(frozen=True, kw_only=True)
class RunShape:
    """A run, in Megatron's terms."""

    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    train_iters: int
    method: str = table.MAIN
    let_layer: int = table.LET_LAYER
    let_stop_step: int = table.LET_STOP_STEP
    kd_stop_step: int | None = None  # None: `KD_STOP_SHARE` of the steps
    teacher_seq_length: int | None = None
    """Tokens that a teacher with another tokenizer reads for a row."""
    dropout: bool = False  # its masks are kept until the backward pass

    def __post_init__(self) -> None:
        for name in ("seq_length", "micro_batch_size", "global_batch_size", "train_iters"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} {getattr(self, name)} must be at least 1.")
        if self.teacher_seq_length is not None and (
            self.teacher_seq_length < 1 or not self.guidance.aligns or self.guidance.distils
        ):
            raise UsageError(
                f"--teacher-seq-length {self.teacher_seq_length} has no effect with --method "
                f"{self.method}: it is the length of the rows of a teacher with another tokenizer, "
                "at least 1, which --method let takes."
            )
        stops = {
            "--let-stop-step": self.let_stop_step if self.guidance.aligns else None,
            "--kd-stop-step": self.kd_stop_step if self.guidance.distils else None,
        }
        for flag, step in stops.items():
            if step is not None and not 1 <= step <= self.train_iters:
                raise UsageError(
                    f"{flag} {step} is outside the run of {self.train_iters} steps. Choose 1 to "
                    f"{self.train_iters}."
                )

    @property
    def guidance(self) -> table.MethodRow:
        """How the method uses its teacher."""
        return table.method_row(self.method)

    @property
    def teacher_row(self) -> int:
        """Tokens of a row as the teacher reads it."""
        return self.teacher_seq_length or self.seq_length

    @property
    def tokens_per_step(self) -> int:
        """Over all ranks."""
        return self.global_batch_size * self.seq_length

    @property
    def tokens_per_micro_batch(self) -> int:
        """On one data-parallel rank."""
        return self.micro_batch_size * self.seq_length

    def tokens_per_rank(self, layout: Layout) -> float:
        """Of a micro-batch, on one context-parallel rank."""
        return self.tokens_per_micro_batch / layout.cp

    def micro_batches(self, layout: Layout) -> int:
        """Micro-batches of one step on each data-parallel rank.

        Raises UsageError if the global batch does not divide, or not as the schedule needs it.
        """
        rows = self.micro_batch_size * layout.dp
        if self.global_batch_size % rows:
            nearest = max(1, round(self.global_batch_size / rows)) * rows
            raise UsageError(
                f"--global-batch-size {self.global_batch_size} is not a multiple of "
                f"--micro-batch-size {self.micro_batch_size} x {layout.dp} data-parallel ranks = "
                f"{rows}. Choose {nearest}, or another micro-batch size."
            )
        number = self.global_batch_size // rows
        if layout.vpp > 1 and number % layout.pp:
            raise UsageError(
                f"--vpp {layout.vpp} needs a multiple of --pp {layout.pp} micro-batches a step; "
                f"--global-batch-size {self.global_batch_size} gives {number}. Choose a multiple "
                f"of {rows * layout.pp}, or --vpp 1."
            )
        return number

    @property
    def let_end(self) -> int:
        """Steps that align the layer; 0 if the method does not."""
        return self.let_stop_step if self.guidance.aligns else 0

    @property
    def kd_end(self) -> int:
        """Steps that distil; 0 if the method does not."""
        if not self.guidance.distils:
            return 0
        if self.guidance.distils_to_the_end:
            return self.train_iters
        return self.kd_stop_step or max(1, round(table.KD_STOP_SHARE * self.train_iters))

    def phases(self) -> tuple[Phase, ...]:
        """The run cut where the teacher's part changes; the first phase is the most guided."""
        bounds = sorted({0, self.let_end, self.kd_end, self.train_iters})
        return tuple(
            Phase(end - start, aligns=start < self.let_end, distils=start < self.kd_end)
            for start, end in pairwise(bounds)
        )


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The hardware, and how much of it the run is expected to use."""

    peak_tflops: float = 312.0
    """Of matrix products in the training precision; the default is the A100's in bf16."""
    memory_gib: float = 80.0
    mfu: float = 0.4
    """Share of the peak at which a stage's own work passes, without the pipeline's bubble."""

    def __post_init__(self) -> None:
        values = {"gpu-peak-tflops": self.peak_tflops, "gpu-memory-gib": self.memory_gib}
        for flag, value in (values | {"mfu": self.mfu}).items():
            if not 0 < value < float("inf"):
                raise UsageError(f"--{flag} {value} must be positive.")
        if self.mfu > 1:
            raise UsageError(f"--mfu {self.mfu} is a share of the peak: at most 1, such as 0.4.")
