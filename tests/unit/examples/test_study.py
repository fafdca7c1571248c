"""What comes next, what earlier runs decide, which teacher makes a regime; the threads."""

import pytest
import torch

from examples.study.study import Study, choose_checkpoint
from examples.study.table import GROWTH_LET, PLAIN, STUDY, Regime
from examples.study.workers import Workers
from tests.unit.examples.study_record import (
    choose_teacher,
    curve,
    new_study,
    write_lines,
    write_run,
)


@pytest.fixture
def study(tmp_path):
    return new_study(STUDY, tmp_path)


def tune(study, arm, losses, settings=None):
    """Finish an arm's five tuning runs."""
    rates = [*arm.rates, arm.rates[1], arm.rates[1]]
    names = settings or [arm.settings[0].name] * 3 + [s.name for s in arm.settings[1:]]
    for run, loss, rate, name in zip(arm.tuning_runs, losses, rates, names, strict=True):
        depth = name if arm.name == "growth" else None
        write_run(study, run, loss, rate, name, depth=depth)


def test_settings_wait_for_rates_and_guided_runs_for_the_teacher(study):
    assert study.is_ready("plain-rate-0.002")
    assert not study.is_ready("plain-rate-x-0.7")
    assert not study.is_ready("let-rate-0.002")
    tune(study, PLAIN, [3.0, 2.9, 3.1, 2.95, 2.8])
    assert not study.is_ready("let-rate-0.002")  # the teachers are not there
    choose_teacher(study, "meet", 2.9, 50.0)
    assert study.is_ready("let-rate-0.002")
    assert not study.is_ready("let-weight-3")
    assert not study.is_ready("growth-let-rate-0.001")  # growth's depth is not tuned yet


def test_the_best_runs_decide_rate_and_setting(study):
    tune(study, PLAIN, [3.0, 2.9, 3.1, 2.95, 2.96])
    model, _, facts = study._resolve(study.planned("plain-rate-x-1.4"))
    assert model.lr == pytest.approx(1.4 * 4e-3)
    for regime in study.table.regimes:
        choose_teacher(study, regime, 2.9, 50.0)
    let = study.planned("let-seed-2").arm
    tune(study, let, [2.8, 2.7, 2.75, 2.65, 2.72])
    model, flags, facts = study._resolve(study.planned("let-seed-2"))
    assert (model.lr, facts["setting"]) == (4e-3, "weight 3")
    assert "--let-stop-step 500 --let-weight 3 " in flags and "teachers/meet" in flags
    model, flags, facts = study._resolve(study.planned("ahead-let"))
    assert (model.lr, facts["setting"], facts["regime"]) == (4e-3, "weight 3", "ahead")
    assert "teachers/ahead" in flags
    _, flags, _ = study._resolve(study.planned("shuffled-let"))
    assert "--teacher-control shuffled" in flags


def test_growth_with_let_takes_the_depth_that_growth_chose(study, monkeypatch):
    tune(study, PLAIN, [3.0, 2.9, 3.1, 2.95, 2.96])
    choose_teacher(study, "meet", 2.9, 50.0)
    tune(study, GROWTH_LET.depth_like, [2.8, 2.7, 2.75, 2.6, 2.72])
    monkeypatch.setattr(Study, "_grown", lambda self, *what: "/".join(map(str, what)))
    _, flags, facts = study._resolve(study.planned("growth-let-rate-0.001"))
    assert facts["depth"] == "identity"
    assert "--pretrained-checkpoint meet/identity/True" in flags and "--method let" in flags


@pytest.fixture
def curves(study, tmp_path):
    """A plain run from 6 to 3, and two teachers that end at 3.8 and 2.9."""
    from examples.study.record import read_summary

    found = []
    for name, final in (("plain-rate-0.002", 3.0), ("let-rate-0.002", 3.8), ("let-weight-3", 2.9)):
        write_run(study, name, final, 1e-3, "x")
        found.append(read_summary(study.record / "runs" / f"{name}.jsonl").run)
    return found


def test_the_first_teacher_that_fits_makes_the_regime(curves):
    plain, small, large = curves
    early = choose_checkpoint([small, large], plain, Regime(0.3, (0.1, 0.5)))
    assert early["teacher"] == small.name and 0.1 <= early["passed"] <= 0.5
    late = choose_checkpoint([small, large], plain, Regime(0.8, (0.77, 0.9)))
    assert late["teacher"] == large.name and late["passed"] == pytest.approx(0.8267, abs=1e-3)
    ahead = choose_checkpoint([small, large], plain, Regime(None, (1.0, float("inf"))))
    assert (ahead["loss"], ahead["passed"]) == (pytest.approx(2.9), None)
    with pytest.raises(ValueError, match=r"let-rate-0.002, step 1000, loss 3.800: 0.73"):
        choose_checkpoint([small], plain, Regime(None, (1.0, float("inf"))))


def test_no_checkpoint_of_a_teacher_in_training_is_taken_for_its_last(study, curves, tmp_path):
    tune(study, PLAIN, [3.0, 2.9, 3.1, 2.95, 2.96])
    record = (study.record / "runs" / "plain-rate-0.002.jsonl").read_text()
    for save in map(study._save, study.teachers):
        save.mkdir(parents=True)
        (save / "metrics.jsonl").write_text("".join(record.splitlines(keepends=True)[:-2]))
    with pytest.raises(ValueError, match="is still in training"):
        study.teacher_folder("ahead")
    choose_teacher(study, "meet", 2.9, 50.0)
    assert study.teacher_folder("meet").name == "meet"
    assert not (study.record / "teachers" / "ahead").exists()


def test_another_machine_trains_no_teacher_that_no_open_regime_takes(study, monkeypatch):
    tune(study, PLAIN, [3.0, 2.9, 3.1, 2.95, 2.8])
    choose_teacher(study, "meet", 2.9, 50.0)
    choose_teacher(study, "overtaken", 3.8, 50.0)
    start = study.summary("plain-rate-0.002").facts
    small, large, deep = study.teachers
    for name, final in ((small, 3.8), (large, 2.9)):
        write_lines(study, name, [start | {"name": name}, *curve(final, 1000)])
    assert [study.is_done(name) for name in study.teachers] == [True, True, False]
    write_lines(study, deep, [start | {"name": deep}, *curve(2.0, 1000)])
    assert [study.is_done(name) for name in study.teachers] == [True, True, False]
    study._save(deep).mkdir(parents=True)  # its checkpoints are at hand
    monkeypatch.setattr("megatron_let.quickstart.run.find_checkpoint", lambda save, step: save)
    record = (study.record / "runs" / f"{deep}.jsonl").read_text()
    (study._save(deep) / "metrics.jsonl").write_text(record)
    assert all(map(study.is_done, study.teachers))


def test_a_loss_without_a_width_does_not_see_a_rotation(monkeypatch):
    monkeypatch.setattr("megatron_let.losses.table.LOSSES", {})  # it adds one
    from examples.study.widthless import cka

    generator = torch.Generator().manual_seed(0)
    student, other = torch.randn(2, 50, 2, 8, generator=generator)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    assert cka(student, student @ turn).max() < 1e-5
    found = cka(student, other)
    assert found.shape == (50, 2) and 0.5 < found.min() == found.max() < 1
    torch.testing.assert_close(found, cka(student, other @ turn), atol=1e-5, rtol=0)


class Recorded(Study):
    """Runs that leave a record at once; one of them fails."""

    def __init__(self, *what):
        super().__init__(*what)
        self.made = []

    def perform(self, name, minutes):
        self.made.append(name)
        if name == "paper-seed-1":
            raise ValueError("no luck")
        if name in self.teachers:
            for regime in self.table.regimes:
                if not (self.record / "teachers" / regime).exists():
                    choose_teacher(self, regime, 2.9, 50.0)
        else:
            write_run(self, name, 3.0, 1e-3, self.planned(name).arm.settings[0].name, depth="stack")


def test_workers_make_all_runs_that_can_be_made_and_tell_of_a_failure(tmp_path):
    study = Recorded(STUDY, tmp_path / "runs", tmp_path / "record")
    with pytest.raises(SystemExit, match="paper-seed-1: no luck"):
        Workers(study, None, None).run(jobs=2)
    assert sorted(study.made) == sorted(study.names)
    for index, name in enumerate(study.made):
        if name not in study.teachers:
            assert set(study.planned(name).needs) <= set(study.made[:index])


def test_workers_keep_to_the_names_and_the_time(tmp_path):
    study = Recorded(STUDY, tmp_path / "runs", tmp_path / "record")
    Workers(study, ["plain-rate-0.002"], minutes=0.5).run(jobs=1)
    assert study.made == []
    Workers(study, ["let-weight-3", "plain-rate-0.002"], minutes=5).run(jobs=1)
    assert study.made == ["plain-rate-0.002"]  # the other one waits for what is not asked for
