"""`--help` of every tool comes before anything is imported that takes seconds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_let.__main__ import COMMANDS
from megatron_let.commands import mistakes_told, tool_parser
from megatron_let.errors import MachineError

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
    name = next(n for n, (where, _) in COMMANDS.items() if where == f"commands.{tool.stem}")
    assert f"usage: megatron-let {name} " in result.stdout and result.stderr == ""
    assert result.stdout.splitlines()[-1] == "IMPORTED []"


def test_a_machine_that_is_at_fault_may_be_tried_again(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, mistakes_told(tool_parser("", "plan")):
        raise MachineError("The hub is away.")
    assert end.value.code == 1
    assert capsys.readouterr().err == "megatron-let plan: error: The hub is away.\n"


def test_what_is_named_comes_with_the_wheel_too() -> None:
    """Errors and hints say `megatron-let COMMAND`; Megatron-LM has tools of its own."""
    for path in (ROOT / "megatron_let").rglob("*.py"):
        assert not re.findall(r"(?<!Megatron's own )tools/\w+\.py", path.read_text()), path
