"""What the README says exists."""

import re
import subprocess
from pathlib import Path

import pytest

from megatron_let.conversion.configs import FLAG_OF
from megatron_let.conversion.families import FAMILIES
from megatron_let.evaluation.harness import PAPER_TASKS
from tests.support.testing import run_distributed

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_make_targets_exist():
    targets = re.findall(r"^make ([a-z-]+)", README, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert {"quickstart", "test"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


@pytest.mark.skipif(not (ROOT / ".venv").exists(), reason="make has made no .venv here")
def test_commands_run_as_typed_in_a_bare_shell():
    """After the line that activates .venv, which stands before all of them."""
    typed = re.findall(r"^(?:python|torchrun) \S+|^\. \S+", README, re.MULTILINE)
    assert typed[0] == ". .venv/bin/activate" and len(typed) > 5, typed
    plan = re.findall(r"^python tools/plan.py .*", README, re.MULTILINE)[0]
    for command in (plan, "torchrun --help"):
        script = f"{typed[0]} && {command} > /dev/null"
        subprocess.run(["sh", "-ec", script], check=True, cwd=ROOT, env={"PATH": "/usr/bin:/bin"})


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not (ROOT / ".venv").exists(), reason="make has made no .venv here")
def test_the_first_ten_commands_run_as_typed():
    """In shells of their own but for the activation; the first one needs a network.

    By their variable ARGS make's targets do a smoke of the quickstart and one file of tests.
    """
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()][:10]
    clone, activate = commands.pop(0), commands.pop(2)
    assert clone.startswith("git clone ") and activate.startswith(". .venv/bin/activate")
    arguments = {"make quickstart": "--fast", "make test": "tests/unit/test_setup_venv.py"}
    for command in commands:
        args = arguments.get(" ".join(command.split()[:2]), "")
        typed = command if args else f"{activate}\n{command}"
        home = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(Path.home())}
        done = subprocess.run(
            ["bash", "-ec", typed],
            cwd=ROOT,
            env=home | {"ARGS": args},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])


def test_linked_and_listed_files_exist():
    paths = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    paths += re.findall(r"python (\S+\.py)", README) + ["pretrain_let.py", "benchmarks"]
    assert len(README.splitlines()) <= 120
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_flags_and_defaults_of_the_tables_are_the_parsers():
    methods = (ROOT / "docs" / "methods.md").read_text()
    defaults = methods.split("## Defaults")[1].split("## Removed")[0]
    rows = re.findall(r"^\| `(--[^|]*)` \| ([^|]*) \|", defaults, re.MULTILINE)
    flags = {flag for cell, _ in rows for flag in re.findall(r"--[a-z-]+", cell)}
    [known] = run_distributed("tests.support.testing:our_flags", 1)
    assert flags <= known.keys()
    for cell, default in rows:
        names = re.findall(r"--[a-z-]+", cell)
        values = [value.strip("` ") for value in default.split(", ")]
        for name, value in zip(names, values, strict=False):
            if known[name] is not None:
                assert value == str(known[name]), name


def test_the_page_of_flags_is_the_parsers():
    [made] = run_distributed("docs.flags:page", 1)
    assert made == (ROOT / "docs" / "flags.md").read_text()


def test_methods_tells_where_each_default_comes_from():
    methods = (ROOT / "docs" / "methods.md").read_text()
    told = set(re.findall(r"--[a-z-]+", methods.split("## Defaults")[1]))
    [known] = run_distributed("tests.support.testing:our_flags", 1)
    valued = {flag for flag in known if flag.startswith(("--let-", "--kd-"))}
    no_default = {"--let-teacher-layer", "--kd-selection"}
    assert valued - no_default <= told


def test_checkpoints_names_what_is_converted_and_evaluated():
    text = (ROOT / "docs" / "checkpoints.md").read_text()
    assert re.findall(r"^\| ([A-Z]\S+) \|", text, re.M) == [family.name for family in FAMILIES]
    sentence = text.split("One-shot accuracy on")[1].split("by [lm-eval")[0]
    assert re.findall(r"[a-z_]{4,}", sentence) == [task.name for task in PAPER_TASKS]
    flags = set(re.findall(r"`(--[a-z-]+)", text)) - set(FLAG_OF.values())
    tools = [
        (ROOT / "megatron_let/commands" / f"{name}.py").read_text()
        for name in ("convert_checkpoint", "evaluate")
    ]
    known = {"--save", "--openai-gelu", "--let-resize"}
    assert not {flag for flag in flags - known if not any(flag in tool for tool in tools)}
