"""The quickstart's own path, in its --fast form: from Python sources to the report."""

import pytest

from tests.support.testing import run_program


def quickstart(folder, *options):
    command = ("megatron_let", "quickstart", "--fast", "--processes", "1")
    result = run_program(*command, "--output", str(folder), *options, timeout=560)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("name", "message"), [("a b", "choose a path without blanks"), ("file", "File exists")]
)
def test_a_mistake_ends_in_a_sentence(tmp_path, name, message):
    (tmp_path / "file" / "fast").parent.mkdir()
    (tmp_path / "file" / "fast").touch()
    output = ("--output", str(tmp_path / name))
    result = run_program("megatron_let", "quickstart", "--fast", *output)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert message in result.stderr and "quickstart: error: " in result.stderr


@pytest.mark.timeout(600)
def test_fast_quickstart_reports_and_is_kept(tmp_path):
    first = quickstart(tmp_path)
    results = tmp_path / "fast" / "behind"
    report = (results / "report.md").read_text()
    assert "| let" in report and "| growth" in report
    assert report.startswith("A SMOKE, NO EVIDENCE: ") and report in first
    assert (results / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "Regime: the plain student" in first
    assert ": loss " in first, "its progress"
    assert "goes on from" in first
    logs = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("log.txt")}
    assert len(logs) == 4
    quickstart(tmp_path)
    assert logs == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("log.txt")}
