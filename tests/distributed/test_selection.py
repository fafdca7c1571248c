"""`tools/select_data.py` over a real training stream, and runs that use what it selected."""

import shutil

import numpy as np
import pytest

from megatron_let.program import as_lines
from tests.distributed.training import TP2_PP2, records, run, series
from tests.support.testing import run_distributed
from tests.support.tiny_run import BATCH, FLAGS, STEPS, VOCAB, hashes

STOP = 3
END = ["--save-interval", str(STEPS)]


def select(ranks, *argv):
    function = "tests.distributed.training:select_samples"
    return run_distributed(function, ranks, [*FLAGS, *argv])[0]


def scorer(corpus):
    """Flags of a scorer that knows little: half of the vocabulary is within its reach."""
    model = f"{corpus.folder}/other"
    return ["--scorer-model", model, "--keep-fraction", "0.5", "--top-k", f"{VOCAB // 2}"]


@pytest.fixture(scope="module")
def salt(corpus):
    """Flags of a SALT run."""
    teacher = ["--teacher-model", f"{corpus.folder}/teacher"]
    return [*corpus.flags, "--method", "salt", "--kd-stop-step", str(STOP), *teacher]


@pytest.fixture(scope="module")
def selection(corpus, salt, tmp_path_factory):
    """A selection by another small model."""
    path = tmp_path_factory.mktemp("selection") / "selection.npz"
    assert select(1, *salt, *scorer(corpus), "--output", str(path), "--scorer-batch", "4") is None
    return path


def samples(path):
    with np.load(path) as file:
        return file["samples"].tolist()


def test_half_of_the_candidates_is_kept(selection):
    chosen = samples(selection)
    assert len(chosen) == STOP * BATCH == len(set(chosen))
    assert chosen == sorted(chosen) and chosen[-1] < 2 * STOP * BATCH
    assert not list(selection.parent.glob("*.parts-*")), "the parts are gone"


@pytest.mark.parametrize(
    "layout",
    [
        [*TP2_PP2, *"--sequence-parallel --tp-comm-overlap --overlap-param-gather".split()],
        pytest.param([], marks=pytest.mark.slow),
    ],
)
def test_processes_and_the_runs_layout_do_not_matter(corpus, salt, selection, tmp_path, layout):
    path, run_file = tmp_path / "again.npz", tmp_path / "run.flags"
    watched = ["--save", str(tmp_path / "run"), "--wandb-project", "p", "--wandb-exp-name", "n"]
    run_file.write_text(as_lines([*salt, *layout, *watched, *END]))
    assert select(2, f"@{run_file}", *scorer(corpus), "--output", str(path)) is None
    assert samples(path) == samples(selection)
    assert not (tmp_path / "run").exists()


def test_an_interrupted_scoring_goes_on(corpus, salt, selection, tmp_path):
    path = tmp_path / "again.npz"
    argv = [*salt, *scorer(corpus)]
    function = "tests.distributed.training:select_samples_interrupted"
    [scored] = run_distributed(function, 1, [*FLAGS, *argv, "--output", str(path)])
    assert scored[0] > 1 and not scored[1], "the parts were there: nothing was scored again"
    assert samples(path) == samples(selection)


def test_the_run_sees_the_selected_samples_until_the_stop(corpus, salt, selection, tmp_path):
    use = ["--kd-selection", str(selection)]
    assert not run(1, *salt, *use, *END, "--save", str(tmp_path / "selected"))
    assert not run(1, *salt, *END, "--save", str(tmp_path / "stream"))
    zero = ["--lr", "0", "--min-lr", "0", "--weight-decay", "0"]  # losses of the same weights
    for name, flags in (("selected 0", use), ("stream 0", [])):
        assert not run(1, *salt, *flags, *zero, *END, "--save", str(tmp_path / name))
    selected, stream = (
        series(tmp_path / f"{name} 0", "lm loss") for name in ("selected", "stream")
    )
    assert all(selected[step] != stream[step] for step in range(1, STOP + 1))
    assert all(selected[step] == stream[step] for step in range(STOP + 1, STEPS + 1))
    flops = [records(tmp_path / name, "train")[1]["flops"] for name in ("selected", "stream")]
    with np.load(selection) as file:
        assert flops[0] - flops[1] == pytest.approx(float(file["flops"])), "scoring is charged"


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(salt, selection, tmp_path):
    flags = [*salt, "--kd-selection", str(selection), "--save-interval", "2"]
    assert not run(1, *flags, "--save", str(tmp_path / "whole"))
    halves = ["--save", str(tmp_path / "halves"), "--load", str(tmp_path / "halves")]
    assert not run(1, *flags, *halves, "--exit-interval", "2")
    moved = ["--kd-selection", str(shutil.copy(selection, tmp_path / "moved.npz"))]
    assert "saved with --kd-selection" in run(1, *salt, *halves)
    assert not run(1, *flags, *halves, *moved)
    assert hashes(tmp_path / "halves") == hashes(tmp_path / "whole")


def test_a_selection_of_another_seed_is_refused(salt, selection, tmp_path):
    error = run(1, *salt, "--kd-selection", str(selection), "--seed", "7")
    assert "was made from other training data, another order" in error


@pytest.mark.slow
def test_at_random(salt, selection, tmp_path):
    path = tmp_path / "random.npz"
    assert select(1, *salt, "--keep-fraction", "0.5", "--output", str(path)) is None
    assert len(samples(path)) == STOP * BATCH and samples(path) != samples(selection)
