"""Evaluations side by side: a column a model, in tables that fit a terminal."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, variance

from megatron_let.evaluation.harness import PAPER_TASKS, TaskScore
from megatron_let.evaluation.perplexity import TextScore
from megatron_let.report.table import markdown_table

Mean = tuple[float, float]
"""A mean and its standard error."""


def accuracy_table(scores: Mapping[str, Mapping[str, TaskScore]], shots: int) -> str:
    """Return accuracies in percent with their standard errors, and their average.

    The average weighs every task alike. The last row compares with the first model question by
    question, which is why its error is smaller than that of the averages.

    Args:
        scores: of every model the score of every task.
        shots: solved examples before every question, for the header.
    """
    labels = list(scores)
    tasks = list(scores[labels[0]])
    chance = {task.name: task.chance for task in PAPER_TASKS}
    rows = [
        (task, f"{100 * chance[task]:.0f}", *(_percent(accuracy(scores[m][task])) for m in labels))
        for task in tasks
    ]
    averages = [average([accuracy(scores[m][task]) for task in tasks]) for m in labels]
    mean_chance = f"{100 * fmean(chance[task] for task in tasks):.0f}"
    rows.append(("average", mean_chance, *(_percent(value) for value in averages)))
    if len(labels) > 1:
        first = scores[labels[0]]
        ahead = [
            average([_paired(scores[m][task], first[task]) for task in tasks]) for m in labels[1:]
        ]
        rows.append((f"less {labels[0]}", "", "", *(_percent(value, sign="+") for value in ahead)))
    header = (f"{shots}-shot accuracy, %", "chance", *labels)
    cuts = {m: sum(score.cut for score in scores[m].values()) for m in labels}
    notes = [
        f"{label}: {cut} prompts were longer than its context and lost their beginning."
        for label, cut in cuts.items()
        if cut
    ]
    return "\n".join([*markdown_table(header, rows), *([""] + notes if notes else [])])


def accuracy(score: TaskScore) -> Mean:
    """Return the share of right answers and its standard error, as the harness computes it."""
    return _mean(score.correct)


def average(means: Sequence[Mean]) -> Mean:
    """Return the mean of independent means."""
    error = math.sqrt(sum(error**2 for _, error in means)) / len(means)
    return fmean(mean for mean, _ in means), error


def _mean(values: Sequence[float]) -> Mean:
    spread = variance(values) if len(values) > 1 else math.nan
    return fmean(values), math.sqrt(spread / len(values))


def _paired(score: TaskScore, other: TaskScore) -> Mean:
    return _mean([a - b for a, b in zip(score.correct, other.correct, strict=True)])


def _percent(value: Mean, sign: str = "") -> str:
    mean, error = value
    return f"{100 * mean:{sign}.1f} ± {100 * error:.1f}"


def text_table(scores: Mapping[str, Mapping[str, TextScore]]) -> str:
    """Return perplexity and bits per byte of every subset, and of all the text together.

    Bits per byte can be compared between tokenizers; perplexities of a token cannot.
    """
    labels = list(scores)
    totals = {label: sum(scores[label].values(), TextScore()) for label in labels}
    one = scores[labels[0]]
    rows = []
    for subset in [*sorted(one), ""]:
        of = [scores[label][subset] if subset else totals[label] for label in labels]
        cells = [f"{score.perplexity:.3f}, {score.bits_per_byte:.4f}" for score in of]
        size = f"{of[0].bytes / 1e6:.2f}"
        rows.append((subset or "all", f"{of[0].documents:,}", size, *cells))
    if len(one) == 1:
        rows = rows[-1:]
    header = ("perplexity, bits per byte", "documents", "MB", *labels)
    return "\n".join(markdown_table(header, rows))
