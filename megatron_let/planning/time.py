"""How long steps and runs take: work of the stages, by Megatron's pipeline schedules.

(Interleaved) 1F1B is played through without communication: with a teacher on one stage no simple
formula holds. Work is FLOPs of one micro-batch, of all ranks of a stage that share it; they pass it
at the given share of their peak, of which communication is a part, whatever the layout.
"""

from collections import deque
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from megatron_let.planning.run import Gpu, Layout, Phase, RunShape
from megatron_let.planning.shapes import FORWARD_AND_BACKWARD, ModelShape
from megatron_let.teacher.work import SCORED_EVERY, share_per_rank

ROUNDS = 5
"""Rounds of `pp` micro-batches after which each further round takes as long as the last one."""


class Pass(NamedTuple):
    """A forward or a backward pass of one micro-batch through one chunk."""

    is_forward: bool
    chunk: int
    micro_batch: int


class Durations(NamedTuple):
    """Of one micro-batch's passes, in any unit: `[stage][chunk]`."""

    forward: tuple[tuple[float, ...], ...]
    backward: tuple[tuple[float, ...], ...]

    @property
    def stages(self) -> tuple[float, ...]:
        """Of each stage, all chunks, forward and backward."""
        both = zip(self.forward, self.backward, strict=True)
        return tuple(sum(forward) + sum(backward) for forward, backward in both)


@cache
def passes(stage: int, pp: int, vpp: int, micro_batches: int) -> tuple[Pass, ...]:
    """What a stage runs in a step, in order.

    As `forward_backward_pipelining_with(out)_interleaving`: `pp` micro-batches go through each
    chunk in turn; after the warm-up a forward and a backward pass alternate.
    """
    behind = pp - 1 - stage
    warm_up = behind if vpp == 1 else 2 * behind + (vpp - 1) * pp
    forward, backward = [], []
    for first in range(0, micro_batches, pp):
        group = range(first, min(first + pp, micro_batches))
        for chunk in range(vpp):
            forward += [Pass(True, chunk, index) for index in group]
            backward += [Pass(False, vpp - 1 - chunk, index) for index in group]
    warm_up = min(warm_up, len(forward))
    steady = [one for pair in zip(forward[warm_up:], backward, strict=False) for one in pair]
    return (*forward[:warm_up], *steady, *backward[len(forward) - warm_up :])


@cache
def most_waiting(
    stage: int, pp: int, vpp: int, micro_batches: int, chunk: int | None = None
) -> int:
    """Forward passes whose backward pass is still to come, at most; of one chunk, or of all."""
    waiting = most = 0
    for one in passes(stage, pp, vpp, min(micro_batches, ROUNDS * pp)):
        if chunk in (None, one.chunk):
            waiting += 1 if one.is_forward else -1
            most = max(most, waiting)
    return most


def step_duration(durations: Durations, micro_batches: int) -> float:
    """How long a step takes; many rounds are not played but follow from the last two."""
    pp = len(durations.forward)
    rounds, rest = divmod(micro_batches, pp)
    if rounds <= ROUNDS:
        return _played(durations, micro_batches)
    before, last = (_played(durations, n * pp + rest) for n in (ROUNDS - 1, ROUNDS))
    return last + (rounds - ROUNDS) * (last - before)


def _played(durations: Durations, micro_batches: int) -> float:
    """Each stage runs its passes in order, as soon as what they need is there."""
    pp, vpp = len(durations.forward), len(durations.forward[0])
    orders = [deque(passes(stage, pp, vpp, micro_batches)) for stage in range(pp)]
    clock = [0.0] * pp
    done: dict[tuple[int, Pass] | None, float] = {None: 0.0}
    while any(orders):
        for stage, order in enumerate(orders):
            while order and (needed := _needed(stage, order[0], pp, vpp)) in done:
                one = order.popleft()
                takes = durations.forward if one.is_forward else durations.backward
                start = max(clock[stage], done[needed])
                clock[stage] = done[stage, one] = start + takes[stage][one.chunk]
    return max(clock)


@cache
def _needed(stage: int, one: Pass, pp: int, vpp: int) -> tuple[int, Pass] | None:
    """The pass, and its stage, that must have ended; None for the first of a micro-batch."""
    place = one.chunk * pp + stage
    if one.is_forward and place == 0:
        return None
    if not one.is_forward and place == vpp * pp - 1:
        return stage, one._replace(is_forward=True)
    chunk, stage = divmod(place - 1 if one.is_forward else place + 1, pp)
    return stage, one._replace(chunk=chunk)


@dataclass(frozen=True)
class SplitTime:
    """What one split of the layers over the stages costs."""

    layout: Layout
    layers: tuple[int, ...]  # of each stage
    teacher_stages: tuple[int, ...]  # in the run's first phase
    plain_work: tuple[float, ...]  # FLOPs of each stage for one micro-batch without the teacher
    guided_work: tuple[float, ...]  # the same in the run's first phase
    phase_seconds: tuple[float, ...]  # of one step in each phase of the run, the most guided first
    plain_seconds: float  # of one step without the teacher
    run_seconds: float  # of the whole run
    guided_overhead: float
    """Of a step of the first phase over a plain one of the same split; 0.1 is a tenth longer."""
    run_overhead: float  # of the whole run over a plain one of the same split
    plain_mfu: float
    """Counted FLOPs of a plain step over the peak of all GPUs: bubble, unequal stages and
    recomputation included."""


def student_work(student: ModelShape, layout: Layout, run: RunShape) -> Durations:
    """FLOPs of one micro-batch's passes; recomputation runs a layer's forward in backward again."""
    tokens = run.tokens_per_micro_batch
    layer = tokens * student.layer_flops_per_token(run.seq_length)
    head = tokens * student.head_flops_per_token
    backward = FORWARD_AND_BACKWARD - 1

    def stages(per_layer: float, in_head: float) -> tuple[tuple[float, ...], ...]:
        split = layout.split(student.num_layers)
        chunks = [[layers / layout.vpp * per_layer] * layout.vpp for layers in split]
        chunks[-1][-1] += in_head
        return tuple(map(tuple, chunks))

    again = layout.recompute == "full"
    return Durations(stages(layer, head), stages((backward + again) * layer, backward * head))


@cache
def split_time(
    student: ModelShape, teacher: ModelShape | None, layout: Layout, run: RunShape, gpu: Gpu
) -> SplitTime:
    """What this layout's split costs."""
    rate = layout.sharing * gpu.peak_tflops * 1e12 * gpu.mfu
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
        per_token += teacher.head_flops_per_token / SCORED_EVERY * run.scores_teacher
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
    phase_seconds = tuple(seconds(work(phase)) for phase in phases)
    run_seconds = sum(phase.steps * s for phase, s in zip(phases, phase_seconds, strict=True))
    counted = student.training_flops_per_token(run.seq_length) * run.tokens_per_step
    return SplitTime(
        layout=layout,
        layers=layout.split(student.num_layers),
        teacher_stages=tuple(teacher_chunks(phases[0])),
        plain_work=plain.stages,
        guided_work=work(phases[0]).stages,
        phase_seconds=phase_seconds,
        plain_seconds=seconds(plain),
        run_seconds=run_seconds,
        guided_overhead=phase_seconds[0] / seconds(plain) - 1,
        run_overhead=run_seconds / (run.train_iters * seconds(plain)) - 1,
        plain_mfu=counted / (layout.gpus * gpu.peak_tflops * 1e12 * seconds(plain)),
    )
