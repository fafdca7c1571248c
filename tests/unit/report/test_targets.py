import math

import pytest

from megatron_let.errors import UsageError
from megatron_let.report.runs import read_run
from megatron_let.report.targets import (
    Cost,
    compare,
    compare_all,
    cost_to_target,
    loss_at,
    regime_sentence,
    speed_up,
)


def first_evaluation_at_or_below(run, target):
    """The classic wrong reading: the first dip counts."""
    return next(e.iteration for e in run.evaluations if e.loss <= target)


def without_interpolation(run, target):
    """The other one: the step of the evaluation itself."""
    above = [i for i, e in enumerate(run.evaluations) if e.loss > target]
    return run.evaluations[above[-1] + 1].iteration


def test_crosses_between_two_evaluations(run_with):
    run = run_with([5.0, 4.4, 4.0, 3.8])
    # 4.4 at step 10 + 10, 4.0 at step 30: 4.1 lies three quarters of the way.
    cost = cost_to_target(run, 4.1)
    assert cost.steps == pytest.approx(27.5)
    assert cost.flops == pytest.approx(2750.0)
    assert cost.seconds == pytest.approx(55.0)
    assert without_interpolation(run, 4.1) == 30


def test_every_axis_is_read_at_the_same_fraction(write, lines):
    from megatron_let.report.runs import read_run

    start, valid, _ = lines
    # Evaluation b took long (a stalled disk) and a decayed teacher made it cheaper.
    second = valid(20, 4.0) | {"flops": 1500.0, "seconds": 120.0}
    run = read_run(write(start(), valid(10, 5.0), second))
    assert cost_to_target(run, 4.5) == Cost(steps=15.0, flops=1250.0, seconds=70.0)


def test_a_dip_that_is_lost_again_does_not_count(run_with):
    run = run_with([5.0, 3.9, 4.5, 3.5, 3.4])
    # Crosses 4.0 before step 20, goes back above at 30, crosses for good between 30 and 40.
    assert cost_to_target(run, 4.0).steps == pytest.approx(35.0)
    assert first_evaluation_at_or_below(run, 4.0) == 20  # the twin: what a naive reading says


def test_exactly_on_the_target_counts(run_with):
    assert cost_to_target(run_with([5.0, 4.0, 4.0, 3.9]), 4.0).steps == pytest.approx(20.0)
    assert cost_to_target(run_with([5.0, 4.5, 4.2, 4.0]), 4.0).steps == pytest.approx(40.0)


def test_never(run_with):
    assert cost_to_target(run_with([5.0, 3.0, 3.0, 4.1]), 4.0) is None
    assert cost_to_target(run_with([5.0, 3.0, 3.0, math.nan]), 4.0) is None


def test_first_evaluation_already_there_and_a_diverged_one_before(run_with):
    assert cost_to_target(run_with([3.0, 2.0]), 4.0).steps == 10.0
    assert cost_to_target(run_with([math.nan, 3.0]), 4.0).steps == 20.0
    assert cost_to_target(run_with([math.inf, 3.0]), 4.0).steps == 20.0


def test_loss_for_the_same_spending(run_with):
    run = run_with([5.0, 4.0, 3.0, 2.5], flops_per_step=125.0)  # 1250 FLOPs between evaluations
    spent = Cost(steps=40.0, flops=4000.0, seconds=50.0)
    assert loss_at(run, spent, "steps") == 2.5
    assert loss_at(run, spent, "flops") == pytest.approx(3.0 - 0.5 * 250 / 1250)
    assert loss_at(run, spent, "seconds") == pytest.approx(3.5)
    assert loss_at(run, Cost(steps=41.0, flops=0.0, seconds=0.0), "steps") is None, "never there"
    assert loss_at(run, Cost(steps=9.0, flops=0.0, seconds=0.0), "steps") is None, "not evaluated"


def test_loss_at_an_evaluation_behind_one_that_is_no_number(run_with):
    run = run_with([4.0, math.nan, 3.0, 2.5])
    assert loss_at(run, Cost(steps=30.0, flops=0.0, seconds=0.0), "steps") == 3.0


def test_plain_run_is_one_by_definition(run_with):
    plain = run_with([5.0, 3.9, 3.9, 4.0])  # by noise already below its final loss at step 20
    assert compare(plain, plain).ratio == Cost(1.0, 1.0, 1.0)
    assert cost_to_target(plain, 4.0).steps < 20


def test_ratios_over_the_plain_run(run_with):
    plain = run_with([6.0, 5.0, 4.5, 4.0])
    let = run_with([5.0, 3.0, 2.9, 2.8], method="let", flops_per_step=110.0)
    comparison = compare(let, plain)
    assert comparison.target_loss == 4.0
    assert comparison.to_target.steps == pytest.approx(15.0)
    assert comparison.ratio.steps == pytest.approx(15 / 40)
    assert comparison.ratio.flops == pytest.approx(15 * 110 / 4000)  # the teacher is charged
    assert comparison.ratio.seconds == pytest.approx(15 / 40)
    assert speed_up([comparison]) == pytest.approx(40 / 15)


def test_every_run_meets_the_plain_run_of_its_seed(run_with):
    runs = [
        run_with([5.0, 3.0], method="let", seed=2, train_iters=20),
        run_with([6.0, 3.0], seed=2, train_iters=20),
        run_with([6.0, 4.0], seed=1, train_iters=20),
        run_with([5.0, 3.0], method="let", seed=1, train_iters=20),
    ]
    comparisons = compare_all(runs)
    assert [(c.run.method, c.run.seed, c.target_loss) for c in comparisons] == [
        ("baseline", 1, 4.0),
        ("baseline", 2, 3.0),
        ("let", 1, 4.0),
        ("let", 2, 3.0),
    ]
    assert [c.to_target.steps for c in comparisons[2:]] == pytest.approx([15.0, 20.0])
    # 20 over the mean of 15 and 20, not the mean of 1.33 and 1.
    assert speed_up(comparisons[2:]) == pytest.approx(20 / 17.5)


def test_refuses_what_does_not_compare(run_with):
    plain = run_with([5.0, 4.0, 3.9, 3.8])
    with pytest.raises(ValueError, match="last evaluated at step 20 of 40: let it finish"):
        compare(plain, run_with([5.0, 4.0], label="short"))
    with pytest.raises(ValueError, match="no target"):
        compare(plain, run_with([5.0, 4.0, 3.0, math.nan], label="broken"))
    for change in ({"seed": 2}, {"tokens_per_step": 16}, {"student_parameters": 5}):
        other = run_with([5.0, 4.0, 3.9, 3.8], method="let", **change)
        with pytest.raises(ValueError, match=next(iter(change))):
            compare(other, plain)
    with pytest.raises(ValueError, match="--method baseline --seed 3"):
        compare_all([plain, run_with([5.0], method="let", seed=3)])
    with pytest.raises(ValueError, match="both 'baseline' with seed 1"):
        compare_all([plain, run_with([5.0, 4.0, 3.9, 3.7], label="plain again")])
    let = run_with([5.0, 4.0, 3.9, 3.7], method="let")
    again = run_with([5.0, 4.0, 3.9, 3.6], method="let", label="let again")
    assert len(compare_all([plain, let, again])) == 3
    with pytest.raises(ValueError, match="both 'let' with seed 1: .*labels of their own"):
        compare_all([plain.__class__(**{**vars(plain), "label": "let"}), let])
    with pytest.raises(ValueError, match="both 'let' with seed 1: .*labels of their own"):
        compare_all([plain, let, let.__class__(**{**vars(again), "label": "let"})])


def test_a_run_whose_record_is_lost_has_no_cost(write, lines):
    """It was complete, and was started again without its metrics.jsonl."""
    start, valid, _ = lines
    nothing = {"tokens": 0, "flops": 0, "seconds": 0}
    plain = read_run(write(start(), valid(40, 4.0), folder="plain"))
    lost = [start(40, method="let"), valid(40, 4.0) | nothing]
    for runs in ([plain, read_run(write(*lost))], [read_run(write(start(40), lost[1]))]):
        with pytest.raises(UsageError, match="counts no work before step 40: the record"):
            compare_all(runs)


def test_regime(run_with):
    plain = run_with([5.0, 4.0, 3.0, 2.0])
    assert "stays worse than its teacher" in regime_sentence(plain, 1.5)
    assert "passes its teacher at step 25 of 40" in regime_sentence(plain, 3.5)
    assert "has a teacher that diverged" in regime_sentence(plain, math.nan)
