"""One picture of a comparison: who reaches the plain run's final loss, and how much earlier."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_let.methods.table import METHODS
from megatron_let.report.runs import Run, shared
from megatron_let.report.targets import Comparison, by_label, guided, speed_up, verdict

PLAIN_COLOUR = "#4d4d4d"
# Okabe and Ito's palette: told apart with every common form of colour blindness.
COLOURS = ("#0072b2", "#d55e00", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#999933")
TEACHER_COLOUR = "#009e73"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "font.family": "sans-serif",
    "text.parse_math": False,  # a label may hold dollars
}
MANY_LINES = 5
"""More than so many labels get a smaller legend, below the axes."""
SKIPPED_START = 0.06
"""The loss axis ends where the curves stand after this fraction of the run: the fall from ln(vocab)
in the first steps would flatten everything that is compared."""


def plot_comparison(
    comparisons: Sequence[Comparison],
    path: Path,
    *,
    teacher_loss: float | None = None,
    title: str | None = None,
) -> Path:
    """Draw validation loss over steps at `path`, which is returned; folders are made.

    `teacher_loss` (nats a token, same validation set) is drawn as a dashed line. Raises ImportError
    with the way out if matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure  # no pyplot: no global state, no display needed
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install matplotlib") from error
    with matplotlib.rc_context(STYLE):
        height = 5.0 if len(by_label(comparisons)) > MANY_LINES else 4.0
        figure = Figure(figsize=(9.2, height), layout="constrained")
        words = textwrap.fill(title or default_title(comparisons), 105)  # what the width holds
        figure.suptitle(words, x=0.01, ha="left", weight="bold")
        _draw_losses(figure.add_subplot(), comparisons, teacher_loss)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, format=path.suffix[1:] or "png")  # and no other name
    return path


def default_title(comparisons: Sequence[Comparison]) -> str:
    """State what is compared: methods, student, steps, tokens a step, number of seeds."""
    plain = comparisons[0].plain
    others = guided(comparisons)
    seeds = len({c.run.seed for c in comparisons})
    names = " and ".join(map(display, others)) if len(others) < 4 else f"{len(others)} methods"
    what = f"{names} against plain training"
    return (
        f"{what if others else 'Plain training'}: {_short(plain.student_parameters)} student, "
        f"{plain.train_iters:,} steps of {plain.tokens_per_step:,} tokens, "
        f"{seeds} seed{'s' if seeds > 1 else ''}"
    )


def display(label: str) -> str:
    """What a label is called: a method by its name."""
    return METHODS[label].label if label in METHODS else label


def _short(count: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"


def looks(comparisons: Sequence[Comparison]) -> dict[str, tuple[str, str]]:
    """Colour and style of every label's line; where the colours begin anew it is dashed."""
    found = dict.fromkeys(by_label(comparisons), (PLAIN_COLOUR, "-"))
    for i, label in enumerate(guided(comparisons)):
        found[label] = (COLOURS[i % len(COLOURS)], "--" if i >= len(COLOURS) else "-")
    return found


def _draw_losses(axes: Any, comparisons: Sequence[Comparison], teacher_loss: float | None) -> None:
    total = max(c.plain_total.steps for c in comparisons)
    target = fmean({c.plain.path: c.target_loss for c in comparisons}.values())
    shown = [target]
    groups = by_label(comparisons)
    for label, look in looks(comparisons).items():
        mean = _draw_runs(axes, [c.run for c in groups[label]], look, display(label))
        shown += [loss for step, loss in mean.items() if step >= SKIPPED_START * total]
    axes.axhline(target, color="#7f7f7f", linestyle=":", label="target: plain run's end")
    if teacher_loss is not None:
        label = f"teacher's own loss ({teacher_loss:.2f})"
        axes.axhline(teacher_loss, color=TEACHER_COLOUR, linestyle="--", label=label)
        shown.append(teacher_loss)
    finite = [loss for loss in shown if math.isfinite(loss)]
    low, high = min(finite), max(finite)
    height = high - low or 1.0  # of one evaluation alone
    axes.set_ylim(low - 0.08 * height, high + 0.02 * height)
    if guided(comparisons):
        _annotate_best(axes, comparisons, target)
    axes.set(xlabel="step", ylabel="validation loss (nats a token)", xlim=(0, total * 1.02))
    if len(groups) > MANY_LINES:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), fontsize=7, ncols=3)
    else:
        axes.legend(loc="upper right")


def _draw_runs(
    axes: Any, runs: Sequence[Run], look: tuple[str, str], label: str
) -> dict[int, float]:
    """Draw a thin line a run, and their mean where all were evaluated; returns it, by step."""
    colour, style = look
    if len(runs) > 1:
        for run in runs:
            steps, losses = zip(*((e.iteration, e.loss) for e in run.evaluations), strict=True)
            axes.plot(steps, losses, color=colour, lw=0.7, alpha=0.45)
    mean = {at[0].iteration: fmean(e.loss for e in at) for at in shared(runs)}
    axes.plot(list(mean), list(mean.values()), style, color=colour, lw=2.0, label=label)
    return mean


def _annotate_best(axes: Any, comparisons: Sequence[Comparison], target: float) -> None:
    """An arrow along the target, from the plain runs' end to the fastest method's crossing."""
    plain_end, crossing = fmean(c.plain_total.steps for c in comparisons), 0.0
    reached = [group for group in guided(comparisons).values() if speed_up(group)]
    beyond = [g for g in reached if not verdict(g, comparisons).startswith("within noise")]
    best = max((speed_up(group) or 0.0 for group in beyond), default=0.0)
    text = "plain run's final loss: not reached"
    if reached and not beyond:
        text = "no difference beyond the seeds' range"
    elif best:
        text = f"{best:.1f}x fewer steps" if best >= 1 else "more steps than plain"
        crossing = plain_end / best
        arrow = {"arrowstyle": "-|>", "color": "black"}
        axes.annotate("", xy=(crossing, target), xytext=(plain_end, target), arrowprops=arrow)
    # Below all curves: they lie close to the target there.
    place, below = (crossing + plain_end) / 2, axes.get_xaxis_transform()
    axes.text(place, 0.01, text, transform=below, ha="center", va="bottom", weight="bold")
