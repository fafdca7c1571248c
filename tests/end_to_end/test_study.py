"""The study in its --fast form: all runs of its table, stopped and gone on with, in one record."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples.study.table import FAST

ROOT = Path(__file__).parents[2]
ALL = len(FAST.runs) + len(FAST.recipe.teachers)


def study(folder: Path, *options: str) -> str:
    command = [sys.executable, str(ROOT / "examples/study/run.py"), "--fast"]
    command += ["--output", str(folder), *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_fast_table_is_made_kept_and_taken_up_elsewhere(tmp_path):
    assert f"3 of {ALL} runs are done" in study(
        tmp_path, "--only", "teacher-small", "plain-rate-0.004", "growth-rate-0.002"
    )
    record = tmp_path / "fast" / "record"
    # Another machine has the record and its teachers, and none of the checkpoints.
    elsewhere = tmp_path / "elsewhere"
    options = ("--record", str(record))
    assert f"{ALL} of {ALL} runs are done" in study(elsewhere, *options)
    assert not (elsewhere / "fast" / "runs" / "teacher-small").exists()
    found = {path.stem: path.read_text().splitlines() for path in (record / "runs").iterdir()}
    assert set(found) == {"teacher-small", *(run.name for run in FAST.runs)}
    for name, lines in found.items():
        start, *evaluations, score = map(json.loads, lines)
        assert len(evaluations) == FAST.recipe.evaluations and score["kind"] == "score", name
        assert score["valid"]["bytes"] > 0 and start["versions"]["torch"] and start["machine"]["id"]
        assert str(ROOT) not in lines[0]
    first = {name: json.loads(lines[1])["lm loss"] for name, lines in found.items()}
    # Growth starts as its teacher: four steps later it is where plain training is not.
    assert first["growth-rate-0.002"] < first["plain-rate-0.004"] - 0.2
    before = {path: path.stat().st_mtime_ns for path in record.rglob("*")}
    assert f"{ALL} of {ALL} runs are done" in study(elsewhere, *options)
    assert before == {path: path.stat().st_mtime_ns for path in record.rglob("*")}
