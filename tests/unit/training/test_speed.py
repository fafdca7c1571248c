import pytest

from megatron_let.training.log import (
    SECONDS_LEFT,
    TEACHER_SHARE,
    TFLOPS,
    TOKENS,
    Interval,
    speed_line,
)
from megatron_let.upstream import cpu


def test_an_interval_counts_what_was_done_since_the_last_one():
    first = Interval({"tokens": 100, "flops": 1e15, "seconds": 1000.0})
    for _ in range(2):
        first.add_step(3.6e13, 4e12, {})
    end = {"tokens": 300, "flops": 9e18, "seconds": 1010.0}
    assert first.speed(end, num_ranks=2, steps_left=720) == pytest.approx(
        {TOKENS: 20.0, TFLOPS: 4.0, TEACHER_SHARE: 0.1, SECONDS_LEFT: 3600.0}
    )
    second = Interval(end)
    second.add_step(4e13, 0.0, {})
    end = {"tokens": 400, "flops": 1.12e15, "seconds": 1012.0}
    assert second.speed(end, num_ranks=2, steps_left=0) == pytest.approx(
        {TOKENS: 50.0, TFLOPS: 10.0, TEACHER_SHARE: 0.0, SECONDS_LEFT: 0.0}
    )


def test_the_line_names_the_teacher_as_long_as_it_works():
    values = {TOKENS: 123456.7, TFLOPS: 151.26, TEACHER_SHARE: 0.0481, SECONDS_LEFT: 90061.0}
    assert speed_line(values) == (
        "> 123,457 tokens/s | 151 TFLOP/s per GPU, teacher 4.8 % | 1 day, 1:01:01 left"
    )
    assert "teacher" not in speed_line(values | {TEACHER_SHARE: 0.0})


def test_a_process_on_cpu_is_no_gpu(monkeypatch):
    monkeypatch.setattr(cpu, "is_active", lambda: True)
    interval = Interval({"tokens": 0, "flops": 0.0, "seconds": 0.0})
    end = {"tokens": 1, "flops": 1.0, "seconds": 1.0}
    found = interval.speed(end, num_ranks=1, steps_left=0)
    assert "TFLOP/s per process" in found and TFLOPS not in found
    assert " TFLOP/s per process | " in speed_line(found)
