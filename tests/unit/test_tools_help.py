"""`--help` of every tool comes before anything is imported that takes seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = sorted((ROOT / "tools").glob("*.py"))
HEAVY = ("torch", "megatron", "transformers", "tokenizers", "safetensors", "lm_eval", "matplotlib")
RUN = f"""
import atexit, runpy, sys
atexit.register(lambda: print("IMPORTED", [name for name in {HEAVY} if name in sys.modules]))
sys.argv = [sys.argv[1], "--help"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.stem)
def test_help_imports_nothing_heavy(tool: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", RUN, str(tool)], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    assert "usage: " in result.stdout and result.stderr == ""
    assert result.stdout.splitlines()[-1] == "IMPORTED []"
