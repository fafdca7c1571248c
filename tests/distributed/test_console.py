"""What a run shows: its own lines; Megatron's log lies in its folder."""

from pathlib import Path

import pytest

from tests.support.testing import run_program
from tests.support.tiny_run import FLAGS, STEPS

PRETRAIN = str(Path(__file__).resolve().parents[2] / "pretrain_let.py")


@pytest.fixture
def run(corpus, tmp_path):
    def make(*more):
        save = ["--save", str(tmp_path / "run")]
        return run_program(PRETRAIN, *FLAGS, *corpus.flags, *corpus.let(), *save, *more)

    return make


def test_a_run_of_eight_steps_fits_a_screen(run, tmp_path):
    done = run("--save-interval", "4")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 60 and done.stderr == ""
    steps = [line for line in lines if line.startswith("> step ") and "tok/s" in line]
    assert len(steps) == STEPS and max(map(len, steps)) <= 100
    assert f"> saved {tmp_path}/run/iter_0000004" in lines
    assert any(line.startswith("> step 3: validation loss ") for line in lines)
    assert lines[-1] == f"> complete at step {STEPS}"
    log = (tmp_path / "run" / "console" / "rank_00000.log").read_text()
    assert "arguments ---" in log and "iteration        8/       8" in log
    assert all(line in log for line in lines[1:])


def test_a_terminal_that_is_gone_ends_no_run(corpus, tmp_path):
    (tmp_path / "full.py").write_text(
        f"import os, runpy\nos.dup2(os.open('/dev/full', os.O_WRONLY), 1)\n"
        f"runpy.run_path({PRETRAIN!r}, run_name='__main__')\n"
    )
    flags = [*FLAGS, *corpus.flags, "--train-iters", "2", "--save", str(tmp_path / "run")]
    done = run_program(str(tmp_path / "full.py"), *flags)
    assert done.returncode == 0 and done.stderr == ""
    log = (tmp_path / "run" / "console" / "rank_00000.log").read_text()
    assert "> complete at step 2" in log


def test_everything_is_shown_where_it_is_asked_for(run, tmp_path):
    done = run("--verbose-console")
    assert "iteration        8/       8" in done.stdout and "arguments ---" in done.stdout
    assert not (tmp_path / "run" / "console").exists()


def test_help_is_shown_with_defaults():
    done = run_program(PRETRAIN, "--help")
    assert done.returncode == 0 and "--let-layer" in done.stdout and "(default: 3)" in done.stdout


def test_a_fault_is_shown(run):
    done = run("--num-layers", "5", "--pipeline-model-parallel-size", "2")
    assert done.returncode == 2 and done.stderr.startswith("pretrain_let.py: error: ")
    unknown = run("--let-wieght", "1")
    assert unknown.returncode == 2
    assert "--let-wieght: did you mean --let-weight?" in unknown.stderr
