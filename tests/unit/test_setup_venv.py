"""tools/setup_venv.sh with Pythons that are shell scripts: the search, the stamp, the repairs."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

REPOSITORY = Path(__file__).parents[2]
TOOLS = ["cat", "cksum", "cp", "dirname", "fold", "head", "mkdir", "readlink", "rm", "sh"]

# Answers the script's probe, makes a .venv with itself in it, and notes what pip is asked for.
FAKE_PYTHON = """#!/bin/sh
case "$1 $2 $3" in
    -V*) echo "Python {version}" ;;
    -c*) echo "{version} {able}" ;;
    "-m venv --clear") rm -rf "$4" && mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
    "-m pip install") echo "${{PIP_CONSTRAINT:-}} $@" >>pip.log && [ ! -e pip-fails ] ;;
esac
"""


class Machine:
    """A checkout, a PATH, a pyenv: all empty but for what a test puts there."""

    def __init__(self, root: Path) -> None:
        self.root, self.path, self.pyenv = root / "check out", root / "bin", root / "pyenv"
        self.path.mkdir()
        for tool in TOOLS:
            (self.path / tool).symlink_to(str(shutil.which(tool)))
        (self.root / "tools").mkdir(parents=True)
        shutil.copy(REPOSITORY / "tools/setup_venv.sh", self.root / "tools")
        (self.root / "pyproject.toml").write_text("first")
        (self.root / "requirements.txt").write_text("")

    def add_python(self, path: Path, version: str, able: str = "able") -> Path:
        return self.add_script(path, FAKE_PYTHON.format(version=version, able=able))

    def add_script(self, path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def run(self, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        home = {"PATH": str(self.path), "HOME": str(self.root), "PYENV_ROOT": str(self.pyenv)}
        return subprocess.run(
            [self.root / "tools/setup_venv.sh", *options],
            env=home | environment,
            capture_output=True,
            text=True,
        )

    def find(self, **environment: str) -> str:
        result = self.run("--find-only", **environment)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def refusal(self, *options: str, **environment: str) -> str:
        """The message, unfolded, of a call that must fail."""
        result = self.run(*options, **environment)
        assert result.returncode == 1
        assert "\n\n" not in result.stderr
        return " ".join(result.stderr.split())

    def installations(self) -> int:
        log = self.root / "pip.log"
        return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_nothing_found(machine: Machine) -> None:
    message = machine.refusal()
    assert "found: none." in message
    assert "Python 3.12 or newer" in message and str(machine.pyenv) in message
    assert "PYTHON=/path/to/python3.12" in message
    assert not (machine.root / ".venv").exists()


def test_too_old_and_bare_pythons_are_named(machine: Machine) -> None:
    old = machine.add_python(machine.path / "python3", "3.11.2")
    bare = machine.add_python(machine.path / "python3.13", "3.13.0", able="bare")
    message = machine.refusal()
    assert f"{old} is 3.11.2, too old" in message
    assert f"{bare} is 3.13.0 without venv and ensurepip" in message


def test_a_shim_that_does_not_run_is_passed_over(machine: Machine) -> None:
    machine.add_script(
        machine.path / "python3.12", "#!/bin/sh\necho 'command not found' >&2; exit 127"
    )
    expected = machine.add_python(machine.path / "python3", "3.12.4")
    assert machine.find() == str(expected)


def test_found_through_pyenv(machine: Machine) -> None:
    machine.add_python(machine.path / "python3", "3.11.7")
    machine.add_python(machine.pyenv / "versions/2.7.18/bin/python", "2.7.18", able="bare")
    expected = machine.add_python(machine.pyenv / "versions/3.12.1/bin/python", "3.12.1")
    assert machine.find() == str(expected)


def test_found_through_uv(machine: Machine) -> None:
    expected = machine.add_python(machine.root.parent / "uv/python3.13", "3.13.2")
    machine.add_script(machine.path / "uv", f"#!/bin/sh\necho '{expected}'")
    assert machine.find() == str(expected)


def test_versions_with_a_wheel_come_first(machine: Machine) -> None:
    newer = machine.add_python(machine.path / "python3", "3.14.0")
    assert machine.find() == str(newer)
    wheel = machine.add_python(machine.pyenv / "versions/3.12.1/bin/python", "3.12.1")
    assert machine.find() == str(wheel)


def test_override(machine: Machine) -> None:
    machine.add_python(machine.path / "python3.12", "3.12.1")
    other = machine.add_python(machine.root.parent / "my python", "3.13.0")
    old = machine.add_python(machine.root.parent / "old", "3.9.18")
    assert machine.find(PYTHON=str(other)) == str(other)
    assert "is 3.9.18, too old" in machine.refusal(PYTHON=str(old))
    assert "does not run" in machine.refusal(PYTHON="/nowhere/python")


def test_override_that_contradicts_venv_is_refused(machine: Machine) -> None:
    machine.add_python(machine.path / "python3.12", "3.12.1")
    other = machine.add_python(machine.root.parent / "other", "3.13.0")
    assert machine.run().returncode == 0
    assert "rm -r .venv" in machine.refusal(PYTHON=str(other))
    assert machine.run(PYTHON=str(machine.path / "python3.12")).returncode == 0
    assert machine.installations() == 1


def test_second_call_reuses(machine: Machine) -> None:
    python = machine.add_python(machine.path / "python3.12", "3.12.1")
    first = machine.run()
    assert first.returncode == 0, first.stderr
    assert "GB on disk" in first.stdout and str(python) in first.stdout
    python.unlink()  # not needed any more
    second = machine.run()
    assert (second.returncode, second.stdout, machine.installations()) == (0, "", 1)


def test_changed_requirements_are_installed(machine: Machine) -> None:
    machine.add_python(machine.path / "python3.12", "3.12.1")
    machine.run()
    (machine.root / "pyproject.toml").write_text("second")
    assert "have changed" in machine.run().stdout
    assert machine.installations() == 2


def test_interrupted_installation_is_continued(machine: Machine) -> None:
    machine.add_python(machine.path / "python3.12", "3.12.1")
    (machine.root / "pip-fails").touch()
    assert "The next call continues it" in machine.refusal()

    packages = machine.root / ".venv/lib/python3.12/site-packages"
    for name in ("whole", "half"):
        (packages / f"{name}-1.0.dist-info").mkdir(parents=True)
    (packages / "whole-1.0.dist-info/INSTALLER").touch()
    (machine.root / "pip-fails").unlink()
    again = machine.run()
    assert again.returncode == 0 and "unfinished: continuing" in again.stdout
    assert [path.name for path in packages.iterdir()] == ["whole-1.0.dist-info"]
    assert machine.installations() == 2


def test_moved_checkout_is_built_anew(machine: Machine) -> None:
    machine.add_python(machine.path / "python3.12", "3.12.1")
    machine.run()
    machine.root = machine.root.rename(machine.root.parent / "elsewhere")
    assert "cannot be moved" in machine.run().stdout
    assert machine.installations() == 2


def test_the_environment_of_another_checkout_is_not_cleared(machine: Machine) -> None:
    machine.add_python(machine.path / "python3.12", "3.12.1")
    machine.run()
    first, second = machine.root, machine.root.with_name("another")
    shutil.copytree(first, second, ignore=shutil.ignore_patterns(".venv"))
    machine.root = second
    (second / ".venv").symlink_to(first / ".venv")
    assert f".venv is the environment of {first}" in machine.refusal()
    assert f"is the environment of {first}" in machine.refusal(VENV=f"{first}/.venv")
    assert (first / ".venv/.setup-stamp").exists()


def test_another_place_with_a_tested_set_of_versions(machine: Machine) -> None:
    """What pip's own settings would allow does not count there."""
    machine.add_python(machine.path / "python3.12", "3.12.1")
    versions = {"VENV": ".venv-oldest", "CONSTRAINTS": "oldest.txt"}
    assert "CONSTRAINTS=oldest.txt: there is no such file" in machine.refusal(**versions)
    (machine.root / "oldest.txt").write_text("torch==2.6.0")
    result = machine.run(**versions, PIP_CONSTRAINT="the-machine's.txt")
    assert ".venv-oldest is ready" in result.stdout
    assert (machine.root / "pip.log").read_text().startswith("oldest.txt ")
    assert not (machine.root / ".venv").exists()
    (machine.root / "oldest.txt").write_text("torch==2.7.0")
    assert "have changed" in machine.run(**versions).stdout


def test_unknown_option(machine: Machine) -> None:
    assert "--find-only" in machine.refusal("--help-me")


def test_requirements_agree_with_pyproject() -> None:
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    required = {line.split("  #")[0].strip() for line in lines if not line.startswith("#")}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert required == {*project["dependencies"], "sentencepiece"}
    names = {re.split(r"[\[<>=~!]", requirement)[0] for requirement in required}
    for group in project["optional-dependencies"].values():
        names |= {re.split(r"[\[<>=~!]", requirement)[0] for requirement in group}
    assert names.isdisjoint({"apex", "transformer-engine", "transformer_engine", "flash-attn"})


def test_the_oldest_set_is_the_lower_bounds_and_the_newest_lies_within() -> None:
    """What the requirements allow is what was run, at both ends."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    bounds = {}
    for requirement in map(Requirement, sum(groups, [])):
        bounds[requirement.name] = requirement.specifier
    oldest, newest = (
        dict(line.split("==") for line in path.read_text().splitlines() if "==" in line)
        for path in (REPOSITORY / "tests/constraints-oldest.txt", REPOSITORY / "constraints.txt")
    )
    lower = {
        name: bound.version
        for name, specifier in bounds.items()
        for bound in specifier
        if bound.operator == ">=" and name not in ("ruff", "mypy")
    }
    assert {name: Version(version) for name, version in oldest.items()} == {
        name: Version(version) for name, version in lower.items()
    }
    assert all(Version(newest[name]) in bounds[name] for name in lower)
