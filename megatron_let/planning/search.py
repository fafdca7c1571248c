"""Which layout is the fastest that fits: all of them are planned, and ranked by the run's time."""

from collections.abc import Iterator
from dataclasses import replace

from megatron_let.errors import UsageError
from megatron_let.planning.layout import Layout
from megatron_let.planning.memory import GIB
from megatron_let.planning.plan import Plan, plan
from megatron_let.planning.run import Gpu, RunShape
from megatron_let.planning.shapes import ModelShape

SHARDS = (1, 2, 4, 8)  # tensor parallelism stays inside a node
ROWS = (1, 2, 4, 8, 16)
CHUNKS = (1, 2, 4)


def search(
    student: ModelShape,
    teacher: ModelShape | None,
    layout: Layout,
    run: RunShape,
    gpu: Gpu,
    number: int = 5,
) -> list[Plan]:
    """Return the best plans for so many GPUs, the fastest first.

    TP, PP, VPP, rows of a micro-batch and recomputation are tried; the rest is as given. Of equal
    times the one with fewer ranks to talk to, and more rows at once, comes first. Raises UsageError
    if nothing fits; if nothing is possible, with what Megatron would say to the plainest layout.
    """
    plans: list[Plan] = []
    refusals: list[UsageError] = []
    for split, rows in candidates(student, layout, run):
        try:
            own = replace(run, micro_batch_size=rows)
            plans.append(plan(student, teacher, split, own, gpu, ()))
        except UsageError as refusal:
            refusals.append(refusal)
    if not plans:
        raise refusals[0]
    fitting = sorted((one for one in plans if one.fits), key=_rank, reverse=True)
    if not fitting:
        least = min(one.memory[one.fullest_stage].total for one in plans) / GIB
        raise UsageError(
            f"No layout of {layout.gpus} GPUs with {gpu.memory_gib:g} GiB holds it: the smallest "
            f"needs {least:.1f}, with full recomputation. Use more GPUs, or a smaller student."
        )
    best = {one.layout: one for one in fitting}  # with its best rows, which come last
    return sorted(best.values(), key=_rank)[:number]


def candidates(student: ModelShape, layout: Layout, run: RunShape) -> Iterator[tuple[Layout, int]]:
    """All layouts, and rows of a micro-batch, that divide."""
    ranks = layout.gpus // layout.cp
    evenly = replace(
        layout, sequence_parallel=None, first_stage_layers=None, last_stage_layers=None
    )
    for tp in (tp for tp in SHARDS if ranks % tp == 0):
        stages = (pp for pp in range(1, student.num_layers + 1) if ranks // tp % pp == 0)
        for pp in stages:
            for vpp in CHUNKS if pp > 1 else (1,):
                for recompute in ("none", "full"):
                    own = replace(evenly, tp=tp, pp=pp, vpp=vpp, recompute=recompute)
                    yield from ((own, rows) for rows in ROWS)


def _rank(one: Plan) -> tuple[float, ...]:
    layout = one.layout
    # Of equal work the sum differs in the last digits.
    seconds = float(f"{one.given.run_seconds:.6g}")
    return seconds, layout.tp, layout.pp, layout.vpp, -one.run.micro_batch_size
