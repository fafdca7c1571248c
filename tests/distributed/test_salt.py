"""Whole runs with distillation, alone and with LET, and controls: logs, the stop, resuming."""

import pytest

from tests.distributed.training import TP2_PP2, records, run, series
from tests.support.tiny_run import STEPS, hashes

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
    shares = series(salt[0], "teacher better share")
    assert len(shares) == STOP and all(0 < share < 1 for share in shares.values())


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


# --- let+salt, and controls -------------------------------------------------------------------

GUIDED = {
    "let": ["--method", "let", "--let-layer", "2", "--let-stop-step", "2"],
    "salt": ["--method", "salt", "--kd-stop-step", "3"],
    "let+salt": [
        "--method",
        "let+salt",
        *"--let-layer 2 --let-stop-step 2 --kd-stop-step 3".split(),
    ],
}
END = ["--exit-interval", "4"]


@pytest.fixture(scope="module")
def plain(corpus, tmp_path_factory):
    """Hashes of a plain run's weights and optimizer state."""
    folder = tmp_path_factory.mktemp("plain")
    assert not run(1, *corpus.flags, *END, "--save", str(folder))
    return hashes(folder)


@pytest.mark.parametrize("method", GUIDED)
def test_weight_zero_is_plain_training_bit_for_bit(corpus, plain, tmp_path, method):
    guided = [*GUIDED[method], "--teacher-model", f"{corpus.folder}/teacher", *END]
    control = ["--teacher-control", "zero"]
    assert not run(1, *corpus.flags, *guided, *control, "--save", str(tmp_path / "zero"))
    assert hashes(tmp_path / "zero") == plain
    assert series(tmp_path / "zero", "teacher time (ms)")[1] > 0
    # The twin: without the control the same guidance changes the weights.
    assert not run(1, *corpus.flags, *guided, "--save", str(tmp_path / "guided"))
    assert hashes(tmp_path / "guided") != plain


def test_each_signal_ends_at_its_own_step(corpus, tmp_path):
    flags = [*GUIDED["let+salt"], "--teacher-model", f"{corpus.folder}/teacher", *END]
    layout = [*TP2_PP2, "--sequence-parallel"]
    losses, steps = [], []
    for ranks, extra in ((1, []), (4, layout)):
        save = tmp_path / str(ranks)
        assert not run(ranks, *corpus.flags, *flags, *extra, "--save", str(save))
        losses.append([set(series(save, f"{name} loss")) for name in ("let", "kd", "lm")])
        flops = [0.0, *(record["flops"] for _, record in sorted(records(save, "train").items()))]
        steps.append([after - before for before, after in zip(flops, flops[1:], strict=False)])
    assert losses == [[{1, 2}, {1, 2, 3}, {1, 2, 3, 4}]] * 2
    one, four = steps
    assert one[0] == one[1] == one[2] > one[3] == four[3], "one forward pass feeds both"
    assert four[0] == four[1] > four[2] == one[2], "on two stages it takes two"


@pytest.mark.parametrize("control", ["random", "shuffled"])
def test_controls_guide_otherwise(corpus, tmp_path, control):
    flags = [*GUIDED["let+salt"], "--teacher-model", f"{corpus.folder}/other", *END]
    for name, extra in (("real", []), ("control", ["--teacher-control", control])):
        assert not run(1, *corpus.flags, *flags, *extra, "--save", str(tmp_path / name))
    for key in ("let loss", "kd loss"):
        real, other = (series(tmp_path / name, key)[1] for name in ("real", "control"))
        assert real != pytest.approx(other, rel=1e-4)
    same = [
        records(tmp_path / n, "start")[0]["teacher"]["fingerprint"] for n in ("real", "control")
    ]
    assert (same[0] == same[1]) == (control == "shuffled")


def test_let_alone_measures_the_teachers_loss_as_distillation_does(corpus, tmp_path):
    """In every tenth step. Tolerance 1e-5 relative; the twin is another teacher's loss."""
    let = "--method let --let-layer 2 --let-stop-step 4 --guidance-stop loss".split()
    let += ["--guidance-patience", "4"]
    salt = "--method salt --kd-stop-step 4".split()
    layout = [*TP2_PP2, "--sequence-parallel"]
    found = {}
    for name, ranks, flags in (
        ("distilled", 1, salt), ("one", 1, let), ("four", 4, [*let, *layout]), ("other", 1, salt)
    ):  # fmt: skip
        teacher = f"{corpus.folder}/{'other' if name == 'other' else 'teacher'}"
        own = [*corpus.flags, *flags, "--teacher-model", teacher, "--exit-interval", "2"]
        assert not run(ranks, *own, "--save", str(tmp_path / name))
        found[name] = series(tmp_path / name, "teacher loss")
    assert found["one"].keys() == found["four"].keys() == {1}
    for name in ("one", "four"):
        assert found[name][1] == pytest.approx(found["distilled"][1], rel=1e-5)
        assert found[name][1] != pytest.approx(found["other"][1], rel=1e-5)


def test_guidance_auto_is_the_flags_that_it_says(corpus, tmp_path):
    flags = [*corpus.flags, "--method", "let+salt", "--let-layer", "2"]
    flags += ["--teacher-model", f"{corpus.folder}/teacher", "--save-interval", "5"]
    written_out = (
        "--let-weight-rule ratio --let-gradient-ratio 0.5 --let-stop-step 4 --kd-token-gate "
        "--guidance-stop loss --kd-stop-step 4 --guidance-patience 4"
    )
    for name, how in (("auto", "--guidance auto"), ("flags", written_out)):
        assert not run(1, *flags, *how.split(), "--save", str(tmp_path / name))
    assert hashes(tmp_path / "auto") == hashes(tmp_path / "flags")
    # A longer run chooses a later stop: then the checkpoint's guidance would change.
    resumed = ["--load", str(tmp_path / "auto"), "--save", str(tmp_path / "auto")]
    error = run(1, *flags, "--guidance", "auto", *resumed, "--train-iters", "20")
    assert error and "Resume with the checkpoint's" in error
