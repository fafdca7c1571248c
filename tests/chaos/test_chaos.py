"""The tool that shows what a run survives can't be content with nothing."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import faults, jobs
from tests.chaos.__main__ import ROOT, commits_seed, draw, table
from tests.chaos.compare import differing
from tests.chaos.faults import FAULTS, LAYOUTS, MOMENTS, POINTS, Missed, befall
from tests.support.testing import run_distributed
from tests.support.tiny_run import FLAGS, Corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return run_distributed("tests.support.tiny_run:make_corpus", 1, folder)[0]


def test_every_fault_and_layout_is_drawn():
    cases = draw(50, seed=3)
    assert cases == draw(50, seed=3) != draw(50, seed=4)
    assert {fault for fault, _, _ in cases} == FAULTS.keys()
    assert {layout for _, _, layout in cases} == LAYOUTS.keys()
    assert {moment for _, moment, _ in cases} <= {*MOMENTS, *POINTS, "save"}
    assert not any(fault == "tmpfs full" for fault, _, _ in draw(50, seed=3, with_tmpfs=False))
    assert commits_seed() == commits_seed() > 0


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """Runs of two steps: one, the same again, and others that differ in one thing each."""
    folder = tmp_path_factory.mktemp("trained")
    flags = [*FLAGS, *corpus.flags, "--hidden-dropout", "0.1", "--exit-interval", "2"]
    others = {
        "one": [],
        "same": [],
        "moments": ["--adam-beta2", "0.9"],
        "schedule": ["--lr-warmup-iters", "1"],
        "random": ["--seed", "99"],
    }
    for name, more in others.items():
        argv = [*flags, *more, "--save", str(folder / name)]
        assert run_distributed("tests.distributed.training:train", 1, argv) == [None]
    return folder


def test_the_same_run_differs_in_nothing(trained):
    assert differing(trained / "same", trained / "one") == []


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("moments", "optimizer.state.exp_avg_sq."),
        ("schedule", "common.opt_param_scheduler.lr_warmup_steps"),
        ("random", "rng_state/"),
        ("random", "output_layer.weight"),
    ],
)
def test_what_differs_is_found(trained, name, found):
    assert any(item.startswith(found) for item in differing(trained / name, trained / "one"))


POOL = """
import sys
from concurrent.futures import ThreadPoolExecutor
sys.pool = ThreadPoolExecutor(1)
sys.pool.submit(int).result()
raise RuntimeError
"""


def test_a_rank_that_fails_ends_its_pools(tmp_path, monkeypatch):
    rank = tmp_path / "rank.py"
    rank.write_text(POOL)
    monkeypatch.setattr(jobs, "RANK", str(rank))
    if (child := os.fork()) == 0:
        jobs._run_in_fork(["python", str(rank)], dict(os.environ), -1, -1)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
    assert ended == (child, 256)


class Ended:
    """A job that was over before anything could befall it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(["true"])

    def ranks(self):
        return []

    def wait_for(self, condition):
        return bool(condition())

    def kill(self):
        self.process.wait()
        return 0


HIT = [kind for kind, (_, moments) in FAULTS.items() if moments != ("save",)]


@pytest.mark.parametrize("fault", HIT)
def test_a_fault_that_hits_nothing_is_a_failure(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(faults, "start", lambda *args, **options: Ended(tmp_path))
    monkeypatch.setattr(faults, "START_SECONDS", 0)
    for moment in FAULTS[fault][1]:
        folder = tmp_path / "folder"
        outcome = befall(Corpus(tmp_path), "DP 2", fault, moment, folder, 1, tmp_path)
        assert not outcome.struck and not outcome.survived and outcome.draws == faults.MAX_DRAWS
        assert "MISSED" in table([outcome])
        shutil.rmtree(folder)


def test_a_moment_that_does_not_come_is_missed(tmp_path):
    job: Any = Ended(tmp_path)
    victim = faults.Victim(job, tmp_path, random.Random(0))
    for moment in (*MOMENTS.values(), faults.at_point):
        if moment is not faults.at_start:  # then there is no step yet
            with pytest.raises(Missed):
                moment(victim)


@pytest.mark.slow
def test_the_command(tmp_path):
    """Two minutes: one fault, its run started again, and the undisturbed run; called twice."""
    command = [sys.executable, "-m", "tests.chaos", "--faults", "1", "--output", str(tmp_path)]
    for _ in range(2):
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout
        assert f"--seed {commits_seed()}" in result.stdout
        assert "Of 1, 1 struck, 1 end identical." in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill a rank", "TERM"])
def test_four_ranks(corpus, tmp_path, fault):
    """Minutes on two cores."""
    script = f"""
from pathlib import Path
from tests import preloaded
from tests.chaos.faults import befall, run_to_its_end
from tests.support.tiny_run import Corpus
corpus, out = Corpus(Path({str(corpus.folder)!r})), Path({str(tmp_path)!r})
layout = "TP 2, PP 2, SP"
run_to_its_end(corpus, layout, out / "whole", out / "jobs")
outcome = befall(corpus, layout, {fault!r}, "before the tracker", out / "f", 1, out / "whole")
assert outcome.survived, outcome
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
