from argparse import Namespace

import pytest
import torch

from megatron_let.quickstart.run import PROGRESS
from megatron_let.training.log import (
    SECONDS_LEFT,
    TEACHER_SHARE,
    TFLOPS,
    TOKENS,
    Interval,
    evaluation_line,
    step_line,
    tokens_per_step,
)
from megatron_let.upstream import cpu


def test_a_mean_is_over_the_steps_that_had_the_value():
    interval = Interval({"tokens": 0, "flops": 0.0, "seconds": 0.0})
    for losses in ({"lm loss": 3.0, "let loss": 0.5}, {}, {"lm loss": 1.0}):  # one was skipped
        interval.add_step(1.0, 0.0, {name: torch.tensor(value) for name, value in losses.items()})
    assert interval.means() == {"lm loss": 2.0, "let loss": 0.5}


def test_of_a_batch_that_grows_the_mean_is_told():
    args = Namespace(train_samples=64, global_batch_size=2, seq_length=16)
    for args.step_batch_size_schedule, args.train_iters, expected in (
        (None, 10, 32),
        ("0:4,400:8", 10, 102),
        ("0:4,400:8", None, None),  # --skip-train
    ):
        assert tokens_per_step(args) == expected


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


def test_the_line_of_a_step_fits_and_names_each_signal():
    speed = {TOKENS: 1234567.8, SECONDS_LEFT: 12 * 86400.0 + 3661}
    means = {"lm loss": 2.81234, "let loss": 0.23123, "let weight": 0.0871, "let gradient": 1.0}
    line = step_line(19073, 19073, means, speed)
    assert line == (
        "> step 19073/19073 | loss 2.8123 | let 0.231 x 0.087 | 1,235k tok/s | 289:01 left"
    )
    assert PROGRESS.search(line).groups() == ("19073", "2.8123"), "the quickstart's bar reads it"
    assert len(step_line(19073, 19073, means | {"kd loss": 1.5, "kd weight": 0.67}, speed)) <= 100
    assert "let" not in step_line(1, 2, {"lm loss": 1.0}, speed)[:40]
    # Nothing was learnt in the interval: Megatron made no update. By samples, no end is known.
    assert step_line(7, None, {}, speed).startswith("> step 7 | 1,235k tok/s")


def test_the_line_of_an_evaluation_names_several_sets():
    means, sets = {"lm loss": 2.5}, {"web": {"lm loss": 2.0}, "code": {"lm loss": 3.0}}
    assert evaluation_line(4, means, {"all": means}) == "> step 4: validation loss 2.5000"
    assert evaluation_line(4, means, sets).endswith("2.5000 (web 2.0000, code 3.0000)")


def test_a_process_on_cpu_is_no_gpu(monkeypatch):
    monkeypatch.setattr(cpu, "is_active", lambda: True)
    interval = Interval({"tokens": 0, "flops": 0.0, "seconds": 0.0})
    end = {"tokens": 1, "flops": 1.0, "seconds": 1.0}
    found = interval.speed(end, num_ranks=1, steps_left=0)
    assert "TFLOP/s per process" in found and TFLOPS not in found
