"""Whole runs with distillation: what is logged, the stop, resuming."""

import pytest

from tests.distributed.training import STEPS, TP2_PP2, hashes, records, run, series

STOP = 4
SALT = ["--method", "salt", "--kd-stop-step", str(STOP), "--teacher-model"]


@pytest.fixture(scope="module")
def salt(corpus, tmp_path_factory):
    """A run of SALT that saves before and after its stop step, and its flags."""
    folder = tmp_path_factory.mktemp("salt")
    flags = [*corpus.flags, *SALT, f"{corpus.folder}/teacher"]
    for step in (STOP - 1, STOP + 1, STEPS):
        load = ["--load", str(folder), "--save", str(folder), "--save-interval", str(step)]
        ends = ["--exit-interval", str(step)] if step < STEPS else []
        assert not run(1, *flags, *load, *ends)
    return folder, flags


def test_resumed_run_is_the_uninterrupted_one(salt, tmp_path):
    folder, flags = salt
    assert not run(1, *flags, "--save", str(tmp_path), "--save-interval", "100")
    assert hashes(folder) == hashes(tmp_path)


def test_language_model_loss_is_logged_as_in_plain_training(salt, corpus, tmp_path):
    assert not run(1, *corpus.flags, "--save", str(tmp_path), "--exit-interval", "1")
    assert series(salt[0], "lm loss")[1] == pytest.approx(series(tmp_path, "lm loss")[1], rel=1e-6)


def test_distillation_is_logged_until_the_stop_and_never_after_it(salt):
    for key in ("kd loss", "kd weight", "teacher time (ms)"):
        assert set(series(salt[0], key)) == set(range(1, STOP + 1))
    assert set(series(salt[0], "lm loss")) == set(range(1, STEPS + 1))


def test_teacher_is_charged_in_guided_steps_only(salt):
    flops = [record["flops"] for _, record in sorted(records(salt[0], "train").items())]
    steps = [after - before for before, after in zip([0.0, *flops], flops, strict=False)]
    assert steps[:STOP] == pytest.approx([steps[0]] * STOP)
    assert steps[STOP:] == pytest.approx([steps[STOP]] * (STEPS - STOP))
    assert steps[0] > steps[STOP]


def test_another_layout_follows(salt, tmp_path):
    """Tolerance 1e-4 relative on every loss, float32, as it starts from the saved weights."""
    folder, flags = salt
    load = ["--load", str(folder), "--finetune", "--exit-interval", "3"]
    for name, ranks, layout in (("one", 1, []), ("four", 4, [*TP2_PP2, "--sequence-parallel"])):
        assert not run(ranks, *flags, *load, *layout, "--save", str(tmp_path / name))
    for key in ("lm loss", "kd loss"):
        one, four = (series(tmp_path / name, key) for name in ("one", "four"))
        assert one == pytest.approx(four, rel=1e-4)
