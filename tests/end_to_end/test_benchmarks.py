"""The benchmarks run in their short form, which has no targets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *flags: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--fast", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_teacher_cost() -> None:
    said = run("teacher_cost.py", "--pairs", "3")
    assert said.count("0 teacher calls") == 3 and "a smoke, no targets" in said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_preprocess() -> None:
    """Identical pairs of both engines, and of Megatron-LM where a checkout is at hand."""
    checkout = os.environ.get("MEGATRON_LM_PATH")
    said = run("preprocess.py", *(["--megatron-lm", checkout] if checkout else []))
    assert said.count("identical, sha256") == 2
    assert ("theirs_text_document.bin" in said) == bool(checkout)


@pytest.mark.slow
def test_conversion() -> None:
    """The weights come back as they were; the short form has no targets."""
    said = run("conversion.py")
    assert "to-hf" in said and "no targets" in said


@pytest.mark.slow
@pytest.mark.timeout(600)  # half a minute of one core, on a busy machine more
def test_gpu_on_cpu(tmp_path: Path) -> None:
    """Its smoke; rank 7 of TP 2 x PP 2 x DP 2 trains its steps, each mode with its own signals."""
    command = [sys.executable, "benchmarks/gpu.py", "--cpu-smoke", "--output", str(tmp_path)]
    for known in (0, 3):  # the second call measures nothing again
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        assert "all parts ran, no target missed" in done.stdout
        assert done.stdout.count(": known") == known
    found = json.loads((tmp_path / "7b-rank-7-of-8.json").read_text())["found"]
    assert found["trained"] == found["steps"] == 12
    passes = found["teacher_passes"]
    assert set(passes) == {"let", "salt"} and passes["let"] == passes["salt"] > 0
    [row] = (tmp_path / "tested_on.md").read_text().splitlines()
    assert row.startswith("| 20") and "`benchmarks/gpu.py --cpu-smoke`" in row
