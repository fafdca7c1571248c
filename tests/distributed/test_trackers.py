"""What a run leaves for those who watch it: TensorBoard, W&B, metrics, a record of each start."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_let.training.log import SECONDS_LEFT, TEACHER_SHARE, TOKENS
from tests.distributed.training import records, run
from tests.support.testing import run_distributed
from tests.support.tiny_run import FLAGS, STEPS

TFLOPS = "TFLOP/s per process"  # on CPU
SPEEDS = (TOKENS, TFLOPS, TEACHER_SHARE, SECONDS_LEFT)
STOP = 4  # of `tiny_run.LET`


@pytest.fixture(scope="module")
def watched(corpus, tmp_path_factory):
    """A run with W&B in two starts, which keeps two checkpoints and every sixth."""
    save = tmp_path_factory.mktemp("watched") / "run"
    keep = "--save-interval 1 --save-keep-last 2 --save-retain-interval 3".split()
    wandb = "--wandb-project tests --wandb-exp-name tiny".split()
    argv = [*FLAGS, *corpus.flags, *corpus.let(), *keep, *wandb, "--save", str(save)]
    function = "tests.distributed.training:train_tracked"
    assert run_distributed(function, 1, [*argv, "--exit-interval", "5"]) == [None]
    assert run_distributed(function, 1, [*argv, "--load", str(save)]) == [None]
    return save


def test_each_step_tells_its_speed(watched):
    steps = records(watched, "train")
    assert list(steps) == list(range(1, STEPS + 1))
    assert all(steps[i][TOKENS] > 0 and steps[i][TFLOPS] > 0 for i in steps)
    assert [i for i in steps if steps[i][TEACHER_SHARE] > 0] == list(range(1, STOP + 1))
    assert [i for i in steps if steps[i][SECONDS_LEFT] > 0] == list(range(1, STEPS))


def test_tensorboard_has_it(watched):
    events = EventAccumulator(str(watched / "tensorboard"))
    events.Reload()
    for key in ("lm loss", *SPEEDS):
        assert [e.step for e in events.Scalars(key)] == list(range(1, STEPS + 1)), key
    assert [e.step for e in events.Scalars("let loss")] == list(range(1, STOP + 1))
    assert not [key for key in events.Tags()["scalars"] if "GPU" in key]


def test_both_starts_are_one_wandb_run(watched):
    runs = list((watched / "wandb" / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert {path.name.rpartition("-")[2] for path in runs} == {
        (watched / "wandb_run_id.txt").read_text().split()[0]
    }


def test_each_start_is_recorded(watched):
    first, second = (json.loads(path.read_text()) for path in sorted(watched.glob("starts/*.json")))
    assert (first["iteration"], second["iteration"]) == (0, 5)
    assert "--exit-interval" in first["command"] and "--load" in second["command"]
    assert first["arguments"]["let_stop_step"] == STOP
    assert first["arguments"]["num_layers"] == 4
    assert first["versions"]["megatron-core"] and first["versions"]["torch"]


def test_two_checkpoints_stay_and_every_third(watched):
    kept = sorted(path.name for path in watched.iterdir() if "iter_" in path.name)
    assert kept == [f"iter_{step:07d}" for step in (3, 6, 7, 8)]


def test_a_run_without_these_flags_keeps_all(corpus, tmp_path):
    save = ("--save", str(tmp_path), "--save-interval", "2", "--train-iters", "6")
    assert not run(1, *corpus.flags, *save)
    assert len(list(tmp_path.glob("iter_*"))) == 3
