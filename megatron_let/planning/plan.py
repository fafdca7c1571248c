"""A plan: does it fit, what does the teacher cost, which split of the layers is best."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_let.errors import UsageError
from megatron_let.planning.layout import Layout
from megatron_let.planning.memory import GIB, StageMemory, stages_memory
from megatron_let.planning.run import Gpu, RunShape
from megatron_let.planning.shapes import ModelShape
from megatron_let.planning.time import SplitTime, split_time

WORTH_A_FLAG = 0.005  # a split that saves less than this share of the run is not worth another flag


@dataclass(frozen=True)
class Plan:
    """A run on paper."""

    student: ModelShape
    teacher: ModelShape | None  # None also where the method uses none
    layout: Layout
    run: RunShape
    gpu: Gpu
    memory: tuple[StageMemory, ...]  # of a rank of each stage of the layout as given
    given: SplitTime  # the layout as given
    suggested: SplitTime
    """The split with the shortest run that fits; the given one if nothing is gained."""
    suggested_fits: bool

    @property
    def fullest_stage(self) -> int:
        """The stage whose ranks hold most."""
        return max(range(len(self.memory)), key=lambda stage: self.memory[stage].total)

    @property
    def fits(self) -> bool:
        """Whether the layout as given fits the GPUs' memory."""
        return _fits(self.memory, self.gpu)

    @property
    def flags(self) -> str:
        """Megatron's flags of layout and micro-batch."""
        layout = self.layout
        words = [
            f"--tensor-model-parallel-size {layout.tp}",
            f"--pipeline-model-parallel-size {layout.pp}",
            f"--micro-batch-size {self.run.micro_batch_size}",
        ]
        words += ["--sequence-parallel"] * (layout.sequence_shards > 1)
        words += [f"--context-parallel-size {layout.cp}"] * (layout.cp > 1)
        words += [f"--num-virtual-stages-per-pipeline-rank {layout.vpp}"] * (layout.vpp > 1)
        if layout.recompute == "full":
            words.append("--recompute-granularity full --recompute-method uniform")
            words.append("--recompute-num-layers 1")
        return " ".join(words)

    @property
    def student_flops_per_token(self) -> float:
        """Forward and backward."""
        return self.student.training_flops_per_token(self.run.seq_length)

    @property
    def teacher_flops_per_token(self) -> float:
        """In the first phase: states on each stage that wants them, logits if it distils."""
        if self.teacher is None:
            return 0.0
        states = self.teacher.states_flops_per_token(self.run.seq_length, self.run.teacher_row)
        logits = self.teacher.head_flops_per_token * self.run.guidance.distils
        return states * len(self.given.teacher_stages) + logits

    @property
    def overhead_floor(self) -> float:
        """Of a guided step if the teacher's work were spread over all GPUs."""
        return self.teacher_flops_per_token / self.student_flops_per_token


def plan(
    student: ModelShape,
    teacher: ModelShape | None,
    layout: Layout,
    run: RunShape,
    gpu: Gpu | None = None,
    splits: Sequence[Layout] | None = None,
) -> Plan:
    """Plan a run of a student with its padded vocabulary.

    The default GPU is an A100 with 80 GiB, 0.4 of whose peak a stage's work uses. One of `splits`
    of the layers is suggested; by default of all. Raises UsageError where Megatron would refuse the
    layout, or the method lacks something.
    """
    gpu = gpu or Gpu()
    teacher = _check(student, teacher, layout, run)
    given = split_time(student, teacher, layout, run, gpu)
    splits = [layout, *(layout.splits(student.num_layers) if splits is None else splits)]
    memory = {split: stages_memory(student, teacher, split, run) for split in splits}
    fitting = [split for split in splits if _fits(memory[split], gpu)]
    times = [
        given if split == layout else split_time(student, teacher, split, run, gpu)
        for split in fitting or splits
    ]
    suggested = min(times, key=lambda t: t.run_seconds * (1 + WORTH_A_FLAG * _changes(t, given)))
    fits = bool(fitting)
    return Plan(student, teacher, layout, run, gpu, memory[layout], given, suggested, fits)


def _changes(time: SplitTime, given: SplitTime) -> int:
    """How many flags set a split apart from the given one; none if the layers lie alike."""
    if time.layers == given.layers:
        return 0
    return max(1, time.layout.split_flags.count("--"))


def _fits(memory: tuple[StageMemory, ...], gpu: Gpu) -> bool:
    return max(stage.total for stage in memory) <= gpu.memory_gib * GIB


def _check(
    student: ModelShape, teacher: ModelShape | None, layout: Layout, run: RunShape
) -> ModelShape | None:
    """Refuse what Megatron or the method would; return the teacher if the method uses one."""
    _check_shards(student, layout, run)
    layout.split(student.num_layers)
    run.micro_batches(layout)
    if not run.guidance.has_teacher:
        return None
    if teacher is None:
        raise UsageError(
            f"--method {run.method} needs a teacher. Add --teacher, or plan --method baseline."
        )
    if run.guidance.distils and layout.cp > 1:
        raise UsageError(
            f"--cp {layout.cp} is not supported with --method {run.method}, which distils. Remove "
            "it, or plan --method let."
        )
    if run.guidance.aligns and not 1 <= run.let_layer <= student.num_layers:
        raise UsageError(
            f"--let-layer {run.let_layer} is outside the student: choose 1 to "
            f"{student.num_layers} (an early layer is meant, such as 2 or 3)."
        )
    return teacher


def _check_shards(student: ModelShape, layout: Layout, run: RunShape) -> None:
    if run.seq_length % (2 * layout.cp) and layout.cp > 1:
        raise UsageError(
            f"--seq-length {run.seq_length} does not divide into two parts for each of --cp "
            f"{layout.cp} ranks. Change one of them."
        )
    sizes = {
        "--num-attention-heads": student.num_attention_heads,
        "--ffn-hidden-size": student.ffn_hidden_size,
        "the padded vocabulary": student.vocab_size,
        "--seq-length": run.seq_length if layout.sequence_shards > 1 else 0,
    }
    for name, size in sizes.items():
        if size % layout.tp:
            raise UsageError(
                f"{name} {size} does not divide over --tp {layout.tp} ranks. Change one of them."
            )
    groups = student.num_query_groups
    if groups % layout.tp and layout.tp % groups:
        raise UsageError(
            f"--num-query-groups {groups} must be a multiple or a divisor of --tp {layout.tp}."
        )
