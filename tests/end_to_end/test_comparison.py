"""`examples/comparison` in its --fast form: every method and control, one report; a sweep."""

import subprocess
import sys
from pathlib import Path

import pytest

from examples.comparison.run import variants
from megatron_let.quickstart.run import FAST

ROOT = Path(__file__).parents[2]


def run_script(name: str, output: Path, *flags: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / "comparison" / name), "--fast"]
    command += ["--processes", "1", "--output", str(output), *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_method_is_in_the_report_and_a_setting_can_be_swept(tmp_path):
    run_script("run.py", tmp_path, "--regimes", "behind")
    report = (tmp_path / "fast" / "behind" / "comparison.md").read_text()
    assert all(f"| {name} " in report for name in ["baseline", *variants(FAST)])
    assert (tmp_path / "fast" / "behind" / "comparison.png").read_bytes().startswith(b"\x89PNG")

    setting = "salt --kd-weight 0.5 --kd-stop-step 20"
    table = run_script("sweep.py", tmp_path, "--seed", "1", setting)
    assert "| sweep salt kd-weight 0.5 kd-stop-step 20 " in table


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_teacher_with_another_tokenizer_is_compared(tmp_path):
    said = run_script("other_tokenizer.py", tmp_path, "--seeds", "1")
    assert "| LET, other tokenizer " in said
    assert "bits per byte with the other tokenizer" in said


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_public_model_guides_a_student(tmp_path):
    """SmolLM2-135M, from a wheel of 93 MB."""
    said = run_script("../real_teacher/run.py", tmp_path)
    assert "| LET, SmolLM2-135M " in said
    assert " % of the tokens had a target." in said
