"""SIGTERM where no step is being trained: the run ends at the next place where it can save."""

import pytest

from megatron_let.checkpoint.choice import find_damage
from tests.distributed.training import run, series
from tests.support.testing import run_distributed
from tests.support.tiny_run import FLAGS, STEPS, hashes

EVALUATED = 3
FLAGS_OF_ALL = f"--hidden-dropout 0.1 --eval-interval {EVALUATED} --eval-iters 2".split()


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """The undisturbed run."""
    save = tmp_path_factory.mktemp("undisturbed") / "run"
    assert not run(1, *corpus.flags, *corpus.let(*FLAGS_OF_ALL), "--save", str(save))
    return save


@pytest.mark.parametrize(("where", "step"), [("data", 1), ("evaluation", EVALUATED)])
def test_it_saves_and_goes_on_to_the_same_weights(corpus, whole, tmp_path, where, step):
    flags = [*corpus.flags, *corpus.let(*FLAGS_OF_ALL), "--save", str(tmp_path)]
    function = "tests.distributed.training:train_with_sigterm_in"
    assert run_distributed(function, 1, [*FLAGS, *flags], where) == [None]
    assert max(series(tmp_path, "lm loss")) == step
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == str(step)
    assert find_damage(tmp_path / f"iter_{step:07d}") is None

    assert not run(1, *flags, "--load", str(tmp_path))
    assert max(series(tmp_path, "lm loss")) == STEPS
    assert hashes(tmp_path) == hashes(whole)
