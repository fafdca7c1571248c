"""Time of a step from the work of its pipeline stages.

Work is FLOPs of one micro-batch, of all ranks of a stage that share it; they pass it at the given
share of their peak, of which communication is a part, whatever the layout.
"""

from dataclasses import dataclass
from functools import cache

from megatron_let.planning.layout import Layout
from megatron_let.planning.run import Gpu, Phase, RunShape
from megatron_let.planning.schedule import Durations, step_duration
from megatron_let.planning.shapes import FORWARD_AND_BACKWARD, ModelShape
from megatron_let.teacher.work import share_per_rank


@dataclass(frozen=True)
class SplitTime:
    """What one split of the layers over the stages costs."""

    layout: Layout
    layers: tuple[int, ...]  # of each stage
    teacher_stages: tuple[int, ...]  # in the run's first phase
    plain_work: tuple[float, ...]  # FLOPs of each stage for one micro-batch without the teacher
    guided_work: tuple[float, ...]  # the same in the run's first phase
    phase_steps: tuple[int, ...]
    phase_seconds: tuple[float, ...]  # of one step in each phase of the run, the most guided first
    plain_seconds: float  # of one step without the teacher
    plain_mfu: float
    """Counted FLOPs of a plain step over the peak of all GPUs: bubble, unequal stages and
    recomputation included."""

    @property
    def guided_seconds(self) -> float:
        """Of one step of the run's first phase."""
        return self.phase_seconds[0]

    @property
    def run_seconds(self) -> float:
        """Of the whole run."""
        return sum(n * s for n, s in zip(self.phase_steps, self.phase_seconds, strict=True))

    @property
    def guided_overhead(self) -> float:
        """Of a guided step over a plain one of the same split; 0.1 is a tenth longer."""
        return self.guided_seconds / self.plain_seconds - 1

    @property
    def run_overhead(self) -> float:
        """Of the whole run over a plain one of the same split."""
        return self.run_seconds / (sum(self.phase_steps) * self.plain_seconds) - 1


def student_work(student: ModelShape, layout: Layout, run: RunShape) -> Durations:
    """FLOPs of one micro-batch's passes; recomputation runs a layer's forward in backward again."""
    tokens = run.tokens_per_micro_batch
    layer = tokens * student.layer_flops_per_token(run.seq_length)
    head = tokens * student.head_flops_per_token
    backward = FORWARD_AND_BACKWARD - 1

    def passes(per_layer: float, in_head: float) -> tuple[tuple[float, ...], ...]:
        split = layout.split(student.num_layers)
        chunks = [[layers / layout.vpp * per_layer] * layout.vpp for layers in split]
        chunks[-1][-1] += in_head
        return tuple(map(tuple, chunks))

    again = layout.recompute == "full"
    return Durations(passes(layer, head), passes((backward + again) * layer, backward * head))


def split_time(
    student: ModelShape, teacher: ModelShape | None, layout: Layout, run: RunShape, gpu: Gpu
) -> SplitTime:
    """What this layout's split costs."""
    peak = gpu.peak_tflops * 1e12
    rate = layout.sharing * peak * gpu.mfu
    counted = student.training_flops_per_token(run.seq_length) * run.tokens_per_step
    plain = student_work(student, layout, run)

    def teacher_chunks(phase: Phase) -> dict[int, int]:
        """The stages that run the teacher, each in which chunk; once, if it is needed twice."""
        chunks: dict[int, int] = {}
        if phase.aligns:
            chunks.update([layout.place(student.num_layers, run.let_layer)])
        if phase.distils:
            chunks.setdefault(layout.pp - 1, layout.vpp - 1)
        return chunks

    def work(phase: Phase) -> Durations:
        if teacher is None:
            return plain
        tokens = run.tokens_per_micro_batch
        share = share_per_rank(run.micro_batch_size, run.micro_batches(layout), layout.sharing)
        per_token = teacher.states_flops_per_token(run.seq_length, run.teacher_row)
        forward = [list(chunks) for chunks in plain.forward]
        for stage, chunk in teacher_chunks(phase).items():
            forward[stage][chunk] += tokens * per_token * share * layout.sharing
        if phase.distils:
            forward[-1][-1] += tokens * teacher.head_flops_per_token
        return Durations(tuple(map(tuple, forward)), plain.backward)

    @cache  # a phase without guidance is the plain run
    def seconds(durations: Durations) -> float:
        return step_duration(durations, run.micro_batches(layout)) / rate

    phases = run.phases()
    return SplitTime(
        layout=layout,
        layers=layout.split(student.num_layers),
        teacher_stages=tuple(teacher_chunks(phases[0])),
        plain_work=plain.stages,
        guided_work=work(phases[0]).stages,
        phase_steps=tuple(phase.steps for phase in phases),
        phase_seconds=tuple(seconds(work(phase)) for phase in phases),
        plain_seconds=seconds(plain),
        plain_mfu=counted / (layout.gpus * peak * seconds(plain)),
    )
