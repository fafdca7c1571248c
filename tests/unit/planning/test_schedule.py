import random

import pytest

from megatron_let.planning import time as schedule
from megatron_let.planning.time import Durations, most_waiting, passes, step_duration


def equal(pp: int, vpp: int) -> Durations:
    """Stages that take 1 forward and 2 backward, in `vpp` equal chunks."""
    return Durations(((1 / vpp,) * vpp,) * pp, ((2 / vpp,) * vpp,) * pp)


def test_order_of_1f1b():
    def order(stage: int) -> str:
        return " ".join(
            f"{'F' if one.is_forward else 'B'}{one.micro_batch}" for one in passes(stage, 3, 1, 4)
        )

    assert order(0) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert order(2) == "F0 B0 F1 B1 F2 B2 F3 B3"


def test_order_of_interleaved_1f1b():
    # Stage 1 of 2: a warm-up of (2 - 1) x 2 passes; pp micro-batches in each chunk in turn.
    order = [
        f"{'F' if one.is_forward else 'B'}{one.chunk}.{one.micro_batch}"
        for one in passes(1, 2, 2, 4)
    ]
    assert " ".join(order) == (
        "F0.0 F0.1 F1.0 B1.0 F1.1 B1.1 F0.2 B0.0 F0.3 B0.1 F1.2 B1.2 F1.3 B1.3 B0.2 B0.3"
    )


@pytest.mark.parametrize(
    "pp, vpp, micro_batches",
    [(1, 1, 5), (4, 1, 3), (4, 1, 16), (4, 1, 41), (4, 2, 16), (8, 4, 8), (4, 3, 64)],
)
def test_equal_stages_have_the_textbooks_bubble(pp, vpp, micro_batches):
    """Tolerance: rounding."""
    bubble = (pp - 1) / vpp
    assert step_duration(equal(pp, vpp), micro_batches) == pytest.approx(
        3 * (micro_batches + bubble), rel=1e-12
    )


def test_twin_without_warm_up_the_bubble_is_another(monkeypatch):
    """The test above would notice a schedule that is not Megatron's."""

    def no_warm_up(stage: int, pp: int, vpp: int, micro_batches: int):
        return passes(pp - 1, pp, vpp, micro_batches)

    monkeypatch.setattr(schedule, "passes", no_warm_up)
    assert step_duration(equal(4, 1), 16) > 1.5 * 3 * (16 + 3)


def test_a_slow_last_stage_sets_the_pace():
    """Then the closed form holds: m x slowest + the others once. Tolerance: rounding."""
    durations = Durations(((1.0,),) * 3 + ((1.5,),), ((2.0,),) * 3 + ((3.0,),))
    assert step_duration(durations, 16) == pytest.approx(16 * 4.5 + 3 * 3, rel=1e-12)


def test_a_teacher_on_the_first_stage_is_paid_once_a_micro_batch():
    """Bounds: the slowest stage's work, and the closed form of equal stages."""
    durations = Durations(((3.0,), (1.0,), (1.0,), (1.0,)), ((2.0,),) * 4)
    assert 16 * 5 < step_duration(durations, 16) < 16 * 5 + 9
    played = step_duration(durations, 17) - step_duration(durations, 16)
    assert played == pytest.approx(5, rel=1e-12)


def test_many_micro_batches_follow_from_few():
    """Tolerance: 1 %, with stages up to a quarter off the mean, a teacher and an LM head."""
    draw = random.Random(1)
    for _ in range(50):
        pp, vpp = draw.randint(2, 5), draw.choice([1, 1, 2])
        pace = [draw.uniform(0.75, 1.25) for _ in range(pp)]
        forward = [[pace[stage] / vpp] * vpp for stage in range(pp)]
        backward = [[2 * chunk for chunk in chunks] for chunks in forward]
        forward[0][0] += draw.random()
        forward[-1][-1] += 0.5
        backward[-1][-1] += 1.0
        durations = Durations(tuple(map(tuple, forward)), tuple(map(tuple, backward)))
        micro_batches = pp * draw.randint(6, 12)
        played = schedule._played(durations, micro_batches)
        assert step_duration(durations, micro_batches) == pytest.approx(played, rel=0.01)


def test_micro_batches_in_flight():
    assert [most_waiting(stage, 4, 1, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert [most_waiting(stage, 4, 1, 2) for stage in range(4)] == [2, 2, 2, 1]
    # Interleaved, first stage: Megatron's memory penalty 1 + (pp - 1) / (pp v) of pp x v passes.
    assert most_waiting(0, 4, 2, 16) == 4 * 2 * (1 + 3 / 8)
    assert [most_waiting(0, 4, 2, 16, chunk) for chunk in (0, 1)] == [8, 4]
