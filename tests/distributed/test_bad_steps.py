"""A loss that is not a number: the run stops, or leaves the step out, as its flags say."""

import pytest

from megatron_let.testing import run_distributed
from megatron_let.tiny_run import FLAGS, STEPS, hashes
from tests.distributed.training import records, run

STEP, RANK = 3, 1
SKIP = "--bf16 --use-distributed-optimizer --loss-scale 1 --no-check-for-nan-in-loss-and-grad"
EXIT_CODE_RESUME_TO_DISAMBIGUATE = 16


def train(corpus, save, *flags, world_size=2, rank=RANK, step=STEP):
    argv = [*FLAGS, *corpus.flags, *corpus.let(*flags), "--save", str(save), "--save-interval", "1"]
    function = "tests.distributed.training:train_with_nan"
    return run_distributed(function, world_size, argv, step, rank)


def ends(found):
    return [end for end, _ in found]


def test_the_step_is_left_out(corpus, tmp_path):
    assert ends(train(corpus, tmp_path, *SKIP.split())) == [None, None]
    steps = records(tmp_path, "train")
    assert list(steps) == list(range(1, STEPS + 1))
    assert "lm loss" not in steps[STEP] and all("lm loss" in steps[i] for i in (STEP - 1, STEP + 1))
    assert {step: record["ranks"] for step, record in records(tmp_path, "skip").items()} == {
        STEP: [RANK]
    }
    before, left_out, after = (hashes(tmp_path, step) for step in (STEP - 1, STEP, STEP + 1))
    weights = [name for name in before if not name.startswith("optimizer")]
    assert [left_out[name] for name in weights] == [before[name] for name in weights]
    assert [after[name] for name in weights] != [before[name] for name in weights]


def test_the_run_stops_and_goes_on_without_the_step(corpus, tmp_path):
    found = train(corpus, tmp_path)
    assert ends(found) == [EXIT_CODE_RESUME_TO_DISAMBIGUATE] * 2
    said = f"> step {STEP}, rank {RANK}: found NaN in local forward loss calculation"
    assert [said in printed.splitlines() for _, printed in found] == [False, True]
    assert max(records(tmp_path, "train")) == STEP - 1

    go_on = ["--load", str(tmp_path), "--rerun-mode", "disabled", "--iterations-to-skip", str(STEP)]
    assert ends(train(corpus, tmp_path, *go_on)) == [None, None]
    steps = records(tmp_path, "train")
    assert list(steps) == [step for step in range(1, STEPS + 1) if step != STEP]


def test_without_reruns_it_stops_at_once(corpus, tmp_path):
    [(end, printed)] = train(corpus, tmp_path, "--rerun-mode", "disabled", world_size=1, rank=0)
    assert end.startswith("Rank 0, node ") and "Unexpected result nan" in end
    assert f"> step {STEP}, rank 0: found NaN" in printed


def test_the_first_step_of_a_start_is_no_exception(corpus, tmp_path):
    """Megatron does not look at it, and the update would spoil the weights."""
    [(end, printed)] = train(corpus, tmp_path, world_size=1, rank=0, step=1)
    assert "in the first step of this start" in end
    assert "> step 1, rank 0: found NaN" in printed
    assert not list(tmp_path.glob("iter_*"))


@pytest.mark.parametrize("flags", ["", SKIP], ids=["checked", "unchecked"])
def test_a_sound_run_leaves_nothing_out(corpus, tmp_path, flags):
    """The twin: nothing above comes of the flags alone."""
    save = ("--save", str(tmp_path), "--save-interval", "100")
    assert not run(2, *corpus.flags, *corpus.let(*flags.split()), *save)
    assert not records(tmp_path, "skip")
    assert all("lm loss" in record for record in records(tmp_path, "train").values())
