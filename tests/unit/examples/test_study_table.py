"""The declared runs: every arm is tuned alike, and nothing waits for what comes later."""

import pytest

from examples.study.table import FAST, LARGER, REGIMES, STUDY, TUNED


@pytest.mark.parametrize("table", [STUDY, LARGER, FAST])
def test_names_are_unique_and_what_decides_comes_before(table):
    names = [run.name for run in table.runs]
    assert len(set(names)) == len(names)
    for index, run in enumerate(table.runs):
        assert set(run.needs) <= set(names[:index]), run.name


def test_every_arm_gets_as_many_tuning_runs():
    for arm in TUNED:
        runs = [run for run in STUDY.runs if run.group == "tuning" and run.arm is arm]
        assert [run.name for run in runs] == list(arm.tuning_runs)
        assert len(runs) == 5 and len(set(arm.rates)) == 3
        assert {run.seed for run in runs} == {1} and {run.regime for run in runs} == {"meet"}


def test_the_order_is_tuning_seeds_regimes_controls():
    groups = [run.group for run in STUDY.runs if run.name != "paper-seed-1"]
    order = ["tuning", "seeds", "regimes", "controls", "auto", "widths"]
    assert list(dict.fromkeys(groups)) == order
    assert sorted(groups, key=order.index) == groups
    seeds = {(run.arm.name, run.seed) for run in STUDY.runs if run.group == "seeds"}
    assert seeds >= {(arm.name, seed) for arm in TUNED for seed in (2, 3)}
    elsewhere = {(run.regime, run.arm.name) for run in STUDY.runs if run.group == "regimes"}
    assert len(elsewhere) == 8 and {regime for regime, _ in elsewhere} == set(REGIMES) - {"meet"}


def test_sizes_are_the_ones_asked_for():
    recipe = STUDY.recipe
    tokens = recipe.student.steps * recipe.batch * recipe.seq_length
    assert 300_000 <= recipe.student.parameters(0) <= 600_000
    assert tokens >= 20 * recipe.student.parameters(recipe.vocab_size)
    for teacher in recipe.teachers.values():
        own = teacher.steps * recipe.batch * recipe.seq_length
        assert own >= 100 * teacher.parameters(recipe.vocab_size)
    assert recipe.student.steps // recipe.evaluations <= 0.02 * recipe.student.steps
