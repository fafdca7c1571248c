"""Read one run's `metrics.jsonl`, which `training.metrics` describes, into a typed `Run`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_let.errors import UsageError
from megatron_let.methods.table import BASELINE
from megatron_let.training.metrics import TOTALS, read_records

GROWTH = "growth"
"""What plain training is called that starts from a small model."""
THEN = ", then "
"""Between the methods of a run that went on with another one, as where the teacher is gone."""
NOT_ANEW = ("init_from", "teacher")
"""What a run that goes on need not say anew: its teacher is released."""
LOGGED = ("name", "seed", "train_iters", "tokens_per_step", "student_parameters")
"""What a `start` line says as a `Run` does."""


@dataclass(frozen=True)
class Evaluation:
    """One pass over the validation set."""

    iteration: int
    tokens: float
    flops: float
    seconds: float
    """Of training, as the other three from the run's first step on."""
    loss: float
    """Mean LM loss, nats a token."""
    peak_memory: float | None = None
    """Bytes so far on the fullest rank; None where the run did not say."""


@dataclass(frozen=True)
class Run:
    """One training run, with the records of abandoned attempts already dropped."""

    path: Path
    label: str
    """What tables and plots call this kind of run; the method's name unless the reader chose."""
    name: str
    method: str
    seed: int
    train_iters: int
    tokens_per_step: int
    student_parameters: int
    init_from: str | None
    """The small model that it was grown from, if any."""
    teacher_loss: float | None
    """The teacher's own LM loss, nats a token, as the run measured it; None without a teacher."""
    data: str | None
    """Hash of the training data and their order; None where the run did not say."""
    train: tuple[Mapping[str, Any], ...]
    """A record a log interval: `iteration`, and what was logged (`lm loss`, `let weight`, ...)."""
    evaluations: tuple[Evaluation, ...]

    @property
    def final(self) -> Evaluation:
        """The last evaluation. ValueError if the run never evaluated."""
        if not self.evaluations:
            what = "run with --eval-interval and --eval-iters, and wait for the first one"
            raise UsageError(f"{self.path} holds no evaluation: {what}")
        return self.evaluations[-1]

    @property
    def finished(self) -> bool:
        """Whether the last evaluation was made after the last training step."""
        trained = bool(self.train_iters and self.evaluations)
        return trained and self.final.iteration >= self.train_iters

    def series(self, key: str) -> list[tuple[int, float]]:
        """(iteration, value) of one logged training quantity; empty where it was not logged."""
        return [(r["iteration"], r[key]) for r in self.train if key in r]


def read_run(path: Path, *, label: str | None = None) -> Run:
    """Read a run from its `metrics.jsonl`, or from the folder that holds one.

    `label` is for kinds of runs that share a method, such as two alignment weights. Raises
    ValueError for a missing or empty file, and for one that lacks what a run must have.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{file} does not exist: give the folder of a run that has started")
    try:
        start, records = _kept(file)
        method, small = start["method"], start.get("init_from")
        if small:
            method = GROWTH if method == BASELINE else f"{GROWTH} + {method}"
        return Run(
            path=file,
            label=label or method,
            method=method,
            **{name: start[name] for name in LOGGED},
            init_from=small,
            teacher_loss=start["teacher"] and start["teacher"]["lm_loss"],
            data=start.get("data"),
            train=tuple(r for r in records if r["kind"] == "train"),
            evaluations=tuple(_evaluation(r) for r in records if r["kind"] == "valid"),
        )
    except UsageError:
        raise
    except KeyError as error:
        raise UsageError(f"{file}: a record lacks {error}, which this version needs") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"{file}: a value was changed, and is none now: {error}") from error


def _kept(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The last start, and the records that no later attempt has made void."""
    start: dict[str, Any] | None = None
    latest: dict[tuple[str, int], dict[str, Any]] = {}
    for _, record in read_records(file):
        kind, iteration = record["kind"], record["iteration"]
        if kind == "start":
            if start and record["train_iters"] is None:
                continue  # an evaluation by itself, as it was recorded here once
            before = start if start and iteration else {}
            start = record | {name: record.get(name) or before.get(name) for name in NOT_ANEW}
            methods = before.get("method", start["method"])
            if methods.split(THEN)[-1] != start["method"]:
                methods += THEN + start["method"]
            start["method"] = methods
            latest = {key: value for key, value in latest.items() if key[1] <= iteration}
        else:
            latest[kind, iteration] = record
    if start is None:
        raise UsageError(f"{file} has no start line: its run has not begun yet, or is not ours")
    return start, [latest[key] for key in sorted(latest)]


def _evaluation(record: dict[str, Any]) -> Evaluation:
    tokens, flops, seconds, loss = (float(record[name]) for name in (*TOTALS, "lm loss"))
    return Evaluation(record["iteration"], tokens, flops, seconds, loss, record.get("peak memory"))


def shared(runs: Sequence[Run]) -> list[list[Evaluation]]:
    """The evaluations of all runs at each step at which every one was evaluated."""
    by_step = [{e.iteration: e for e in run.evaluations} for run in runs]
    steps = sorted(set(by_step[0]).intersection(*by_step))
    return [[found[step] for found in by_step] for step in steps]
