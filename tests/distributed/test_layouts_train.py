"""Whole runs in other layouts follow the single process, and resume in one another.

Tolerance: 1e-4 relative on every loss in float32, over 20 steps from the same weights.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed.training import TP2_PP2, records, run, series
from tests.support.testing import run_distributed
from tests.support.tiny_run import FLAGS, checkpoint

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4
LAYOUTS = {"single": (1, []), "tp2_pp2_sp": (4, [*TP2_PP2, "--sequence-parallel"])}
LONG = "--train-iters 20 --let-stop-step 20 --lr 3e-3 --eval-interval 100".split()
HALVES = "--use-distributed-optimizer --save-interval 4 --eval-interval 100".split()


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    assert actual == pytest.approx(expected, rel=TOLERANCE)


@pytest.fixture(scope="session")
def initial(corpus, tmp_path_factory):
    """Weights to start from, the same in every layout."""
    folder = tmp_path_factory.mktemp("initial")
    zero = "--lr 0 --min-lr 0 --weight-decay 0 --exit-interval 1".split()
    assert not run(1, *corpus.flags, *zero, "--save", str(folder))
    return folder


@pytest.fixture(scope="session")
def halves(corpus, initial, tmp_path_factory):
    """Guided runs of 8 steps in both layouts, which save after 4."""
    folder = tmp_path_factory.mktemp("halves")
    for name, (world_size, layout) in LAYOUTS.items():
        flags = [*corpus.flags, *corpus.let("--let-stop-step", "6"), *layout, *HALVES]
        load = ["--load", str(initial), "--finetune", "--save", str(folder / name)]
        assert not run(world_size, *flags, *load)
    return folder


def test_losses_follow_the_single_process(corpus, initial, tmp_path):
    for name, (world_size, layout) in LAYOUTS.items():
        flags = [*corpus.flags, *corpus.let(*LONG), *layout]
        load = ["--load", str(initial), "--finetune", "--save", str(tmp_path / name)]
        assert not run(world_size, *flags, *load)
    for key in ("lm loss", "let loss"):
        values = [series(tmp_path / name, key) for name in LAYOUTS]
        assert set(values[0]) == set(range(1, 21))
        assert_close(*values)
        error = max(abs(values[0][i] / values[1][i] - 1) for i in values[0])
        print(f"{key}: largest relative difference {error:.1e}")
    # The twin: what is compared does react to the guidance.
    weaker = [*corpus.flags, *corpus.let(*LONG, "--let-weight", "0.9")]
    load = ["--load", str(initial), "--finetune", "--save", str(tmp_path / "weaker")]
    assert not run(1, *weaker, *load)
    actual, expected = (series(tmp_path / name, "let loss") for name in ("weaker", "single"))
    assert actual != pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize(("saved", "resumed"), [tuple(LAYOUTS), tuple(LAYOUTS)[::-1]])
def test_resumes_in_another_layout(corpus, halves, tmp_path, saved, resumed):
    world_size, layout = LAYOUTS[resumed]
    flags = [*corpus.flags, *corpus.let("--let-stop-step", "6"), *layout, *HALVES]
    load = ["--load", str(halves / saved), "--ckpt-step", "4", "--save", str(tmp_path)]
    assert not run(world_size, *flags, *load)
    for key in ("lm loss", "let loss"):
        assert_close(series(tmp_path, key), series(halves / saved, key))


@pytest.mark.slow
def test_torchrun_trains_and_sigterm_saves(corpus, tmp_path):
    """The command of the README, ended by a scheduler, and resumed."""
    layout = LAYOUTS["tp2_pp2_sp"][1]
    endless = "--train-iters 10000 --let-stop-step 10000".split()
    flags = [*FLAGS, *corpus.flags, *corpus.let(), *layout, *endless, "--save", str(tmp_path)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "4", "pretrain_let.py", *flags, "--exit-signal-handler"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        wait_for_steps(process, tmp_path, 3)
        # The ranks alone: torchrun, told to stop, would kill them if they took 30 seconds.
        for rank in psutil.Process(process.pid).children():
            rank.send_signal(signal.SIGTERM)
        assert process.wait(timeout=200) == 0, (tmp_path / "log.txt").read_text()[-5000:]
    assert "> stopped at step " in (tmp_path / "log.txt").read_text()
    losses = series(tmp_path, "let loss")
    last = max(losses)
    assert set(losses) == set(range(1, last + 1)) == set(series(tmp_path, "lm loss"))
    assert checkpoint(tmp_path).folder.name == f"iter_{last:07d}"

    again = [*corpus.flags, *corpus.let(), *layout, "--load", str(tmp_path), "--save"]
    assert not run(4, *again, str(tmp_path), *endless, "--exit-interval", "1")
    assert max(series(tmp_path, "let loss")) == last + 1
    assert set(records(tmp_path, "start")) == {0, last}


def wait_for_steps(process, save, count):
    """Return once a run has logged some steps."""
    for _ in range(1200):
        assert process.poll() is None, (save / "log.txt").read_text()[-5000:]
        if (save / "metrics.jsonl").exists() and len(series(save, "lm loss")) >= count:
            return
        time.sleep(0.2)
    raise AssertionError((save / "log.txt").read_text()[-5000:])


def test_a_stop_behind_the_end_of_a_run_with_growing_batches(corpus):
    """How many steps its samples make is known when the data is there."""
    words = " ".join([*FLAGS, "--eval-global-batch-size 8 --train-samples 64"])
    words = words.replace("--train-iters 8 ", "").replace("--global-batch-size 8 ", "", 1)
    for stop, told in ("12", "--let-stop-step 12 is beyond the run's 11"), ("11", None):
        grown = ["--step-batch-size-schedule", "0:4,384:8", *corpus.let("--let-stop-step", stop)]
        argv = [*words.split(), *corpus.flags, *grown]
        [error] = run_distributed("tests.distributed.training:train", 1, argv)
        assert error is None if told is None else told in error


def test_what_a_layer_asserts_is_a_sentence(corpus):
    experts = "--num-experts 4 --moe-layer-freq [0,1,0]".split()
    [error] = run_distributed(
        "tests.distributed.training:train", 1, [*FLAGS, *corpus.flags, *experts]
    )
    assert error and "Megatron-LM refuses these flags: Invalid length of moe_layer_pattern" in error
