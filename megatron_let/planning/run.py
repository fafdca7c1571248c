"""What is run, how it lies on its GPUs and how the teacher takes part in it."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, product
from typing import Literal, NamedTuple

from megatron_let.errors import UsageError
from megatron_let.methods import table


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Megatron's parallel layout, and what it keeps of the activations."""

    gpus: int
    tp: int = 1  # tensor-parallel ranks
    pp: int = 1  # pipeline stages
    cp: int = 1  # context-parallel ranks: parts of each sequence
    vpp: int = 1  # virtual chunks on each stage; 1 is the plain 1F1B schedule
    sequence_parallel: bool | None = None  # None: with tensor parallelism
    distributed_optimizer: bool = True
    recompute: Literal["none", "selective", "full"] = "none"
    """selective drops the attention scores, full all but the inputs of layers."""
    flash_attention: bool = True
    """Attention scores are never stored; otherwise those of every layer, unless recomputed."""
    first_stage_layers: int | None = None  # `--decoder-first-pipeline-num-layers`
    last_stage_layers: int | None = None  # `--decoder-last-pipeline-num-layers`

    def __post_init__(self) -> None:
        for name in ("gpus", "tp", "pp", "cp", "vpp"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} {getattr(self, name)} must be at least 1.")
        if self.gpus % (self.sharing * self.pp):
            context = f" x --cp {self.cp}" * (self.cp > 1)
            raise UsageError(
                f"--gpus {self.gpus} is not a multiple of --tp {self.tp} x --pp {self.pp}{context} "
                f"= {self.sharing * self.pp}. Change one of them."
            )
        if self.pp == 1 and (self.vpp > 1 or self.split_flags):
            raise UsageError(
                "--vpp and --decoder-first/last-pipeline-num-layers have no effect with --pp 1. "
                "Remove them, or set --pp."
            )
        if self.sequence_parallel and self.tp == 1:
            raise UsageError("--sequence-parallel has no effect with --tp 1. Remove it.")

    @property
    def dp(self) -> int:
        """Data-parallel ranks."""
        return self.gpus // (self.sharing * self.pp)

    @property
    def sharing(self) -> int:
        """Ranks of a stage that work on the same micro-batch."""
        return self.tp * self.cp

    @property
    def sequence_shards(self) -> int:
        """Parts of the sequence that tensor-parallel ranks hold between the matrix products."""
        return self.tp if self.sequence_parallel in (None, True) else 1

    @property
    def split_flags(self) -> str:
        """The flags that say an uneven split, empty for an even one."""
        flags = {"first": self.first_stage_layers, "last": self.last_stage_layers}
        return " ".join(
            f"--decoder-{end}-pipeline-num-layers {layers}"
            for end, layers in flags.items()
            if layers is not None
        )

    def split(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each stage; raises UsageError where Megatron would refuse this split."""
        if (layers := self._split_or_none(num_layers)) is not None:
            return layers
        chunks = f" of {self.vpp} virtual chunks" if self.vpp > 1 else ""
        ends = f" with {self.split_flags}" if self.split_flags else ""
        way_out = "Use fewer stages or chunks, or another number of layers."
        if possible := list(self.splits(num_layers)):
            evenest = min(possible, key=lambda it: (max(it.split(num_layers)), len(it.split_flags)))
            flags = f"use {evenest.split_flags}" if evenest.split_flags else "split evenly"
            way_out = f"Change --pp, or {flags}."
        raise UsageError(
            f"{num_layers} layers do not divide over {self.pp} pipeline stages{chunks}{ends}. "
            f"{way_out}"
        )

    def _split_or_none(self, num_layers: int) -> tuple[int, ...] | None:
        ends = {0: self.first_stage_layers, self.pp - 1: self.last_stage_layers}
        given = {stage: layers for stage, layers in ends.items() if layers is not None}
        even = (num_layers - sum(given.values())) // max(1, self.pp - len(given))
        stages = tuple(given.get(stage, even) for stage in range(self.pp))
        fits = sum(stages) == num_layers and min(stages) > 0
        return stages if fits and not any(layers % self.vpp for layers in stages) else None

    def splits(self, num_layers: int) -> Iterator["Layout"]:
        """Every split that Megatron takes, those with fewer flags first."""
        sizes = [None, *range(self.vpp, num_layers, self.vpp)] if self.pp > 1 else [None]
        for last, first in sorted(product(sizes, sizes), key=lambda ends: -ends.count(None)):
            layout = replace(self, first_stage_layers=first, last_stage_layers=last)
            if layout._split_or_none(num_layers) is not None:
                yield layout

    def place(self, num_layers: int, layer: int) -> tuple[int, int]:
        """The stage of a layer, counted from 1, and its virtual chunk there (0 without those)."""
        assert 1 <= layer <= num_layers
        chunk_layers = [layers // self.vpp for layers in self.split(num_layers)]
        # The chunks of a round lie stage after stage, round after round.
        ends = list(accumulate(chunk_layers))
        chunk, index = divmod(layer - 1, ends[-1])
        return bisect_right(ends, index), chunk


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
    guidance_stop: str = "step"
    """The rule that ends the guidance; the plan is that of its latest end, the stop step."""
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
    def scores_teacher(self) -> bool:
        """Whether the teacher's own loss is taken where nothing but its states is wanted."""
        return self.guidance_stop == "loss" and self.guidance.aligns and not self.guidance.distils

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
