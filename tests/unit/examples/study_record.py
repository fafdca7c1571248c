"""A study's record without its runs: files such as they leave, with losses that a test chooses."""

import json
from pathlib import Path
from typing import Any

from examples.study.study import Study
from examples.study.table import PLAIN, Table

SCORE = {"nats_per_token": 3.0, "bits_per_byte": 1.5, "tokens": 10, "bytes": 20}


def write_run(
    study: Study, name: str, final: float, rate: float, setting: str, **facts: Any
) -> None:
    """Write the record of a finished run whose loss falls from 6.0 to `final`, evenly."""
    planned = study.planned(name)
    steps = study.table.recipe.student.steps
    start = {
        "kind": "start",
        "iteration": 0,
        "name": name,
        "label": planned.arm.label,
        "method": "baseline" if planned.arm.name == PLAIN.name else planned.arm.name,
        "seed": planned.seed,
        "train_iters": steps,
        "tokens_per_step": 8,
        "student_parameters": 100,
        "teacher": None,
        "data": "the same",
        "flops_per_token": {"student": 600.0, "teacher": 0.0},
        "rate": rate,
        "setting": setting,
        "depth": None,
        "machine": {"id": "abc", "cpu": "a", "cores": 2},
    }
    write_lines(study, name, [start | facts, *curve(final, steps)])


def curve(final: float, steps: int) -> list[dict[str, Any]]:
    """Five evaluations; FLOPs are ten a step."""
    evaluated = [steps * part // 5 for part in range(1, 6)]
    return [
        {
            "kind": "valid",
            "iteration": step,
            "tokens": 8 * step,
            "flops": 10.0 * step,
            "seconds": 2.0 * step,
            "lm loss": 6.0 + (final - 6.0) * step / steps,
            "peak memory": 2.0**20,
        }
        for step in evaluated
    ]


def write_lines(study: Study, name: str, lines: list[dict[str, Any]]) -> None:
    """Write a record with a score at its end."""
    score = {"kind": "score", "iteration": 1, "valid": SCORE, "documentation": SCORE}
    path = study.record / "runs" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")  # several threads read
    partial.write_text("".join(json.dumps(line) + "\n" for line in [*lines, score]))
    partial.replace(path)


def choose_teacher(study: Study, regime: str, loss: float, flops: float) -> None:
    """Pretend that a regime has its teacher."""
    folder = study.record / "teachers" / regime
    folder.mkdir(parents=True)
    size = next(iter(study.teachers))
    about = {"teacher": size, "iteration": 5, "tokens": 80, "flops": flops, "loss": loss}
    (folder / "chosen.json").write_text(json.dumps(about | {"passed": 0.8}))


def new_study(table: Table, folder: Path) -> Study:
    """A study with an empty record."""
    return Study(table, folder / "runs", folder / "record")
