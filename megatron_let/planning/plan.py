"""Does a run fit, what does its teacher cost, and which split of the layers, or layout, is best?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from megatron_let.errors import UsageError
from megatron_let.planning.memory import GIB, StageMemory, stages_memory
from megatron_let.planning.run import Gpu, Layout, RunShape
from megatron_let.planning.shapes import ModelShape, padded_vocab_size
from megatron_let.planning.time import SplitTime, split_time
from megatron_let.teacher.work import SCORED_EVERY

WORTH_A_FLAG = 0.005  # a split that saves less than this share of the run is not worth another flag
SHARDS = (1, 2, 4, 8)  # tensor parallelism stays inside a node
ROWS = (1, 2, 4, 8, 16)
CHUNKS = (1, 2, 4)
MOST_FOUND = 5


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
    fits: bool  # the layout as given, the GPUs' memory
    suggested_fits: bool

    @property
    def fullest_stage(self) -> int:
        """The stage whose ranks hold most."""
        return max(range(len(self.memory)), key=lambda stage: self.memory[stage].total)

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
        scored = self.run.guidance.distils + self.run.scores_teacher / SCORED_EVERY
        logits = self.teacher.head_flops_per_token * scored
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
    """Plan a run of a student with its padded vocabulary; suggest one of `splits`, else of all.

    Raises UsageError where Megatron would refuse the layout, or the method lacks something.
    """
    gpu = gpu or Gpu()
    teacher = _check(student, teacher, layout, run)
    given = split_time(student, teacher, layout, run, gpu)
    splits = [layout, *(layout.splits(student.num_layers) if splits is None else splits)]
    memory = {split: stages_memory(student, teacher, split, run) for split in splits}
    fullest = {split: max(stage.total for stage in memory[split]) for split in splits}
    fitting = [split for split in splits if fullest[split] <= gpu.memory_gib * GIB]
    times = [split_time(student, teacher, split, run, gpu) for split in fitting or splits]

    def price(time: SplitTime) -> float:
        changes = max(1, time.layout.split_flags.count("--")) * (time.layers != given.layers)
        return time.run_seconds * (1 + WORTH_A_FLAG * changes)

    suggested, fit = min(times, key=price), (layout in fitting, bool(fitting))
    return Plan(student, teacher, layout, run, gpu, memory[layout], given, suggested, *fit)


def _check(
    student: ModelShape, teacher: ModelShape | None, layout: Layout, run: RunShape
) -> ModelShape | None:
    """Refuse what Megatron or the method would; return the teacher if the method uses one."""
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


def search(
    student: ModelShape,
    teacher: ModelShape | None,
    layout: Layout,
    run: RunShape,
    gpu: Gpu,
    divisible_by: int | None = None,
) -> list[Plan]:
    """Return the best plans for so many GPUs, the fastest first.

    TP, PP, VPP, rows of a micro-batch and recomputation are tried; the rest is as given. Of equal
    times the one with fewer ranks to talk to, and more rows at once, comes first. Each TP rank gets
    a multiple of `divisible_by` rows of the vocabulary; None: its rows are fixed. Raises UsageError
    if nothing fits; if nothing is possible, with what Megatron would say to the plainest layout.
    """
    plans: list[Plan] = []
    refusals: list[UsageError] = []
    for split, rows in candidates(student, layout, run):
        try:
            own, sized = replace(run, micro_batch_size=rows), student
            if divisible_by is not None:
                padded = padded_vocab_size(
                    student.vocab_size, tp=split.tp, divisible_by=divisible_by
                )
                sized = replace(student, vocab_size=padded)
            plans.append(plan(sized, teacher, split, own, gpu, ()))
        except UsageError as refusal:
            refusals.append(refusal)
    if not plans:
        raise refusals[0]
    best: dict[Layout, Plan] = {}  # each with its best rows
    for one in sorted((one for one in plans if one.fits), key=_rank):
        best.setdefault(one.layout, one)
    if not best:
        least = min(one.memory[one.fullest_stage].total for one in plans) / GIB
        raise UsageError(
            f"No layout of {layout.gpus} GPUs with {gpu.memory_gib:g} GiB holds it: the smallest "
            f"needs {least:.1f}, with full recomputation. Use more GPUs, or a smaller student."
        )
    return list(best.values())[:MOST_FOUND]


def candidates(student: ModelShape, layout: Layout, run: RunShape) -> Iterator[tuple[Layout, int]]:
    """All layouts, and rows of a micro-batch, that divide."""
    even = replace(layout, sequence_parallel=None, first_stage_layers=None, last_stage_layers=None)
    for tp, pp, vpp in product(SHARDS, range(1, student.num_layers + 1), CHUNKS):
        divides = layout.gpus // layout.cp % (tp * pp) == student.num_layers % (pp * vpp) == 0
        if divides and (pp > 1 or vpp == 1):
            for recompute in ("none", "full"):
                own = replace(even, tp=tp, pp=pp, vpp=vpp, recompute=recompute)
                yield from ((own, rows) for rows in ROWS)


def _rank(one: Plan) -> tuple[float, ...]:
    layout = one.layout
    # Of equal work the sum differs in the last digits.
    seconds = float(f"{one.given.run_seconds:.6g}")
    return seconds, layout.tp, layout.pp, layout.vpp, -one.run.micro_batch_size
