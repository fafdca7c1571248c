"""Writers of small `metrics.jsonl` files, used by every test of the report."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_let.report.runs import Run, read_run

TEACHER = {"name": "small", "parameters": 10, "fingerprint": "abc", "lm_loss": 3.0}


def start_line(iteration: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "start",
        "iteration": iteration,
        "name": "a run",
        "method": "baseline",
        "seed": 1,
        "train_iters": 40,
        "tokens_per_step": 8,
        "student_parameters": 100,
        "teacher": None,
        "flops_per_token": {"student": 600.0, "teacher": 20.0},
    } | changes


def valid_line(iteration: int, loss: float, flops_per_step: float = 100.0) -> dict[str, Any]:
    return {
        "kind": "valid",
        "iteration": iteration,
        "tokens": 8 * iteration,
        "flops": flops_per_step * iteration,
        "seconds": 2.0 * iteration,
        "lm loss": loss,
    }


def train_line(iteration: int, **values: float) -> dict[str, Any]:
    line = {"kind": "train", "iteration": iteration, "tokens": 8 * iteration}
    return line | {key.replace("_", " "): value for key, value in values.items()}


@pytest.fixture
def lines():
    """The three kinds of record, as functions: start, valid, train."""
    return start_line, valid_line, train_line


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write records (or raw text) to a metrics.jsonl of its own; returns its folder."""

    def write_records(*records: dict[str, Any] | str, folder: str = "run") -> Path:
        path = tmp_path / folder / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records)
        path.write_text(text)
        return path.parent

    return write_records


@pytest.fixture
def run_with(write: Callable[..., Path]) -> Callable[..., Run]:
    """A run with these validation losses at steps 10, 20, 30, ..."""

    def build(
        losses: Sequence[float],
        *,
        method: str = "baseline",
        seed: int = 1,
        label: str | None = None,
        flops_per_step: float = 100.0,
        **start: Any,
    ) -> Run:
        if method != "baseline":
            start = {"teacher": TEACHER} | start
        records = [start_line(method=method, seed=seed, **start)]
        for place, loss in enumerate(losses, start=1):
            records.append(valid_line(10 * place, loss, flops_per_step))
        return read_run(write(*records, folder=f"{label or method}-{seed}"), label=label)

    return build
