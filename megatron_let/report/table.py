"""A comparison as a markdown table that also reads well in a 100-column terminal."""

from collections.abc import Sequence
from statistics import fmean

from megatron_let.report.runs import Run
from megatron_let.report.targets import Comparison, Cost, loss_at, mean_speed_up

HEADER = ("method", "seed", "final loss", "steps", "FLOPs", "seconds", "speed-up", "teacher")
NEVER = "never"


def comparison_table(comparisons: Sequence[Comparison], teacher_run: Run | None = None) -> str:
    """A row for every run, and for several seeds a row each for their mean and range.

    `steps`, `FLOPs`, `seconds` are ratios over the plain run's totals, `speed-up` is 1 / steps.
    `teacher_run` is the teacher's own pre-training; its FLOPs, over the plain run's, stand in the
    last column. Without it that column says `not given`.
    """
    rows: list[tuple[str, ...]] = []
    for label in dict.fromkeys(c.run.label for c in comparisons):
        group = [c for c in comparisons if c.run.label == label]
        rows += [_seed_row(c, teacher_run) for c in group]
        if len(group) > 1:
            rows += _summary_rows(label, group)
    return "\n".join([*markdown_table(HEADER, rows), "", *_legend(comparisons, teacher_run)])


def losses_table(comparisons: Sequence[Comparison]) -> str:
    """A row for every kind of run: what it has reached for as much as the plain run has spent.

    Means over the seeds, the range behind them. Steps are as many as tokens.
    """
    header = ("method", "seeds", "loss at equal steps", "equal FLOPs", "equal seconds", "memory")
    rows = []
    for label in dict.fromkeys(c.run.label for c in comparisons):
        group = [c for c in comparisons if c.run.label == label]
        losses = [
            _mean_and_range([loss_at(c.run, c.plain_total, axis) for c in group])
            for axis in ("steps", "flops", "seconds")
        ]
        memory = [e.peak_memory for c in group for e in c.run.evaluations if e.peak_memory]
        peak = f"{max(memory) / 2**30:.2f} GiB" if memory else "-"
        rows.append((label, str(len(group)), *losses, peak))
    legend = "memory: the most that any rank had; equal: as much as the plain run in all."
    return "\n".join([*markdown_table(header, rows), "", legend])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table; the first column stands left, the others right."""
    first, *others = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(first), *map(str.rjust, cells[1:], others)]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * first] + ["-" * (width - 1) + ":" for width in others]
    return [line(header), line(rule), *(line(row) for row in rows)]


def _mean_and_range(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    if len(known) == 1:
        return f"{known[0]:.3f}"
    return f"{fmean(known):.3f} ({min(known):.3f}-{max(known):.3f})"


def _seed_row(comparison: Comparison, teacher_run: Run | None) -> tuple[str, ...]:
    run, ratio = comparison.run, comparison.ratio
    loss = f"{run.final.loss:.3f}"
    if not run.finished:
        loss += f" (step {run.final.iteration})"
    if ratio is None:
        axes: tuple[str, ...] = (NEVER, NEVER, NEVER, "-")
    else:
        axes = (*(f"{value:.2f}" for value in ratio), f"{comparison.speed_up:.2f}x")
    teacher = "-"
    if run.teacher_loss is not None or run.init_from is not None:
        teacher = "not given"
        if teacher_run is not None:
            teacher = f"{teacher_run.final.flops / comparison.plain_total.flops:.2f}"
    return (run.label, str(run.seed), loss, *axes, teacher)


def _summary_rows(label: str, group: Sequence[Comparison]) -> list[tuple[str, ...]]:
    losses = [c.run.final.loss for c in group]
    reached = [c.ratio for c in group if c.ratio is not None]
    axes = [
        _summarize([ratio[i] for ratio in reached], len(group)) for i in range(len(Cost._fields))
    ]
    speed_ups = [c.speed_up for c in group if c.speed_up is not None]
    mean = mean_speed_up(group)  # plain steps over mean steps, as the steps column reads
    speed = "-", "-"
    if mean is not None:
        speed = f"{mean:.2f}x", f"{min(speed_ups):.2f}-{max(speed_ups):.2f}x"
    loss = f"{fmean(losses):.3f}", f"{min(losses):.3f}-{max(losses):.3f}"
    columns = ((label, label), ("mean", "range"), loss, *axes, speed, ("", ""))
    return list(zip(*columns, strict=True))


def _summarize(reached: Sequence[float], seeds: int) -> tuple[str, str]:
    """(mean, range) of one axis; a seed that never arrives has no mean, and is said."""
    if not reached:
        return NEVER, NEVER
    if len(reached) < seeds:
        return f"{len(reached)} of {seeds}", f"{min(reached):.2f}-{NEVER}"
    return f"{fmean(reached):.2f}", f"{min(reached):.2f}-{max(reached):.2f}"


def _legend(comparisons: Sequence[Comparison], teacher_run: Run | None) -> list[str]:
    lines = [
        "steps, FLOPs, seconds: cost to stay at or below the plain run's final validation loss,",
        "over the plain run's total (FLOPs with the teacher's forward passes). teacher: FLOPs of",
        "its own pre-training, or the small model's of growth, over the same total and not part",
        "of the FLOPs column.",
    ]
    total = comparisons[0].plain_total
    seconds = fmean(c.plain_total.seconds for c in comparisons if c.run == c.plain)
    lines.append(f"Plain total: {total.steps:.0f} steps, {total.flops:.2e} FLOPs, {seconds:.0f} s.")
    if teacher_run is not None:
        lines.append(f"Teacher's own pre-training: {teacher_run.final.flops:.2e} FLOPs.")
    return lines
