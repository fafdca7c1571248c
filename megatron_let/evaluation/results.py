"""What was measured of models: kept in a file as it comes, and side by side in a table."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from megatron_let.errors import UsageError
from megatron_let.evaluation.harness import PAPER_TASKS, TaskScore
from megatron_let.evaluation.perplexity import TextScore
from megatron_let.files import write_whole
from megatron_let.hugging_face import OWN_FOLDER, TOKENIZER_FILES
from megatron_let.report.table import markdown_table

Mean = tuple[float, float]
"""A mean and its standard error."""


class Results(dict[str, Any]):
    """The results of one model in one file of JSON; one that exists is gone on with.

    `about` is what they were measured with; raises UsageError if the file's is another.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        try:
            before = json.loads(path.read_bytes()) if path.exists() else {}
            super().__init__(before.get("results", {}))
            was = before.get("about", about)
            others = {key: was.get(key) for key in about if was.get(key) != about[key]}
        except (AttributeError, TypeError, ValueError) as error:
            raise UsageError(f"{path} holds no results ({error}): remove it.") from error
        self._path, self._about = path, about
        for key, value in others.items():
            raise UsageError(
                f"{path} holds results with {key} {value}, and this is {about[key]}. Give another "
                "--output; nothing is overwritten."
            )
        path.parent.mkdir(parents=True, exist_ok=True)

    def keep(self, key: str, value: Any) -> None:
        """Add one result; the file is complete at any time."""
        self[key] = value
        text = json.dumps({"about": self._about, "results": self}, indent=1)
        write_whole(self._path, f"{text}\n")


def identity(folder: Path) -> dict[str, list[int]]:
    """Size and time of change of a model's files; UsageError if the folder is no exported model."""
    files = list(folder.glob("*.safetensors"))
    names = ("config.json", *TOKENIZER_FILES, f"{OWN_FOLDER}/*")
    others = [path for name in names for path in folder.glob(name)]
    if not files or folder / "config.json" not in others:
        raise UsageError(
            f"{folder} is no exported model: it lacks config.json or *.safetensors. Export a run "
            "with megatron-let convert to-hf."
        )
    stats = {str(path.relative_to(folder)): path.stat() for path in [*files, *others]}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def accuracy_table(scores: Mapping[str, Mapping[str, TaskScore]], shots: int) -> str:
    """Return accuracies in percent with their standard errors, a column for each model.

    The average weighs every task alike. The last row compares with the first model question by
    question, which is why its error is smaller than that of the averages.
    """
    first, *others = scores
    tasks = list(scores[first])
    chance = {task.name: task.chance for task in PAPER_TASKS}
    correct = {m: [scores[m][task].correct for task in tasks] for m in scores}
    means = {m: [mean_of(answers) for answers in correct[m]] for m in scores}
    rows = [
        (task, f"{100 * chance[task]:.0f}", *(_percent(means[m][row]) for m in scores))
        for row, task in enumerate(tasks)
    ]
    mean_chance = f"{100 * fmean(chance[task] for task in tasks):.0f}"
    rows.append(("average", mean_chance, *(_percent(average(means[m])) for m in scores)))
    if others:
        ahead = [_paired(correct[m], correct[first]) for m in others]
        rows.append((f"less {first}", "", "", *(_percent(value, sign="+") for value in ahead)))
    header = (f"{shots}-shot accuracy, %", "chance", *scores)
    cuts = {m: sum(score.cut for score in scores[m].values()) for m in scores}
    notes = [
        f"{label}: {cut} prompts were longer than its context and lost their beginning."
        for label, cut in cuts.items()
        if cut
    ]
    return "\n".join([*markdown_table(header, rows), *([""] + notes if notes else [])])


def mean_of(values: Sequence[float]) -> Mean:
    """Return the mean and its standard error, as the harness computes it."""
    spread = variance(values) if len(values) > 1 else math.nan
    return fmean(values), math.sqrt(spread / len(values))


def average(means: Sequence[Mean]) -> Mean:
    """Return the mean of independent means."""
    error = math.sqrt(sum(error**2 for _, error in means)) / len(means)
    return fmean(mean for mean, _ in means), error


def _paired(answers: list[list[int]], others: list[list[int]]) -> Mean:
    pairs = zip(answers, others, strict=True)
    return average([mean_of([a - b for a, b in zip(*pair, strict=True)]) for pair in pairs])


def _percent(value: Mean, sign: str = "") -> str:
    mean, error = value
    return f"{100 * mean:{sign}.1f} ± {100 * error:.1f}"


def text_table(scores: Mapping[str, Mapping[str, TextScore]]) -> str:
    """Return perplexity and bits per byte of every subset, and of all the text together.

    Bits per byte can be compared between tokenizers; perplexities of a token cannot.
    """
    models = list(scores.values())
    parts = [(name, [model[name] for model in models]) for name in sorted(models[0])]
    whole = ("all", [sum(model.values(), TextScore()) for model in models])
    rows = []
    for name, of in [*parts, whole] if len(parts) > 1 else [whole]:
        cells = [f"{score.perplexity:.3f}, {score.bits_per_byte:.4f}" for score in of]
        rows.append((name, f"{of[0].documents:,}", f"{of[0].bytes / 1e6:.2f}", *cells))
    header = ("perplexity, bits per byte", "documents", "MB", *scores)
    lines = markdown_table(header, rows)
    if len({score.tokens for score in whole[1]}) > 1:
        lines += ["", "The models' tokens differ, and so do their perplexities: compare the bits."]
    return "\n".join(lines)
