"""`examples/comparison` in its --fast form: every method and control, one report."""

import subprocess
import sys
from pathlib import Path

import pytest

from examples.comparison.run import variants
from examples.quickstart.run import FAST

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_method_is_in_the_report(tmp_path):
    command = [sys.executable, str(ROOT / "examples/comparison/run.py"), "--fast"]
    command += ["--processes", "1", "--regimes", "behind", "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    report = (tmp_path / "fast" / "behind" / "comparison.md").read_text()
    assert all(f"| {name} " in report for name in ["baseline", *variants(FAST)])
    assert (tmp_path / "fast" / "behind" / "comparison.png").read_bytes().startswith(b"\x89PNG")
