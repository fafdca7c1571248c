"""A comparison as a markdown table that also reads well in a 100-column terminal."""

from collections.abc import Sequence
from statistics import fmean

from megatron_let.report.runs import Run
from megatron_let.report.targets import Comparison, Cost, by_label, loss_at, speed_up

HEADER = ("method", "seed", "final loss", "steps", "FLOPs", "seconds", "speed-up", "teacher")
NEVER = "never"


def comparison_table(comparisons: Sequence[Comparison], teacher_run: Run | None = None) -> str:
    """A row for every run, and for several seeds a row each for their mean and range.

    A legend says what the columns are. `teacher_run` is the teacher's own pre-training; without it
    its column says `not given`.
    """
    rows: list[tuple[str, ...]] = []
    for label, group in by_label(comparisons).items():
        rows += [_seed_row(c, teacher_run) for c in group]
        if len(group) > 1:
            rows += _summary_rows(label, group)
    return "\n".join([*markdown_table(HEADER, rows), "", *_legend(comparisons, teacher_run)])


def losses_table(comparisons: Sequence[Comparison]) -> str:
    """A row for every kind of run: what it has reached for as much as the plain run has spent."""
    header = ("method", "seeds", "loss at equal steps", "equal FLOPs", "equal seconds", "memory")
    rows = []
    for label, group in by_label(comparisons).items():
        found = ([loss_at(c.run, c.plain_total, axis) for c in group] for axis in Cost._fields)
        losses = ("-" if None in values else spread(values, 3) for values in found)
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


def spread(values: Sequence[float | None], digits: int) -> str:
    """Mean and range over the seeds; `never` in the place of what a seed does not have."""
    mean, ends = _mean_and_range(values, digits)
    if len(values) == 1:
        return mean
    return ends if None in values or not values else f"{mean} ({ends})"


def _mean_and_range(values: Sequence[float | None], digits: int) -> tuple[str, str]:
    """Of all seeds; in the place of a mean how many have a value, where one has none."""
    known = [value for value in values if value is not None]
    if not known:
        return NEVER, NEVER
    low, high = f"{min(known):.{digits}f}", f"{max(known):.{digits}f}"
    if len(known) < len(values):
        return f"{len(known)} of {len(values)}", f"{low}-{NEVER}"
    return f"{fmean(known):.{digits}f}", f"{low}-{high}"


def _seed_row(comparison: Comparison, teacher_run: Run | None) -> tuple[str, ...]:
    run, ratio = comparison.run, comparison.ratio
    loss = f"{run.final.loss:.3f}" + f" (step {run.final.iteration})" * (not run.finished)
    axes = [NEVER, NEVER, NEVER, "-"]
    if ratio is not None:
        axes = [*(f"{value:.2f}" for value in ratio), f"{speed_up([comparison]):.2f}x"]
    teacher, total = "-", comparison.plain_total.flops
    if run.teacher_loss is not None or run.init_from is not None:
        teacher = f"{teacher_run.final.flops / total:.2f}" if teacher_run else "not given"
    return (run.label, str(run.seed), loss, *axes, teacher)


def _summary_rows(label: str, group: Sequence[Comparison]) -> list[tuple[str, ...]]:
    loss = _mean_and_range([c.run.final.loss for c in group], 3)
    axes = (_mean_and_range([c.ratio and c.ratio[i] for c in group], 2) for i in range(3))
    mean = speed_up(group)  # plain steps over mean steps, as the steps column reads
    speed = "-", "-"
    if mean is not None:
        own = sorted(speed_up([c]) or 0.0 for c in group)
        speed = f"{mean:.2f}x", f"{own[0]:.2f}-{own[-1]:.2f}x"
    columns = ((label, label), ("mean", "range"), loss, *axes, speed, ("", ""))
    return list(zip(*columns, strict=True))


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
