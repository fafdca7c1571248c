"""Guidance that ends itself."""

from argparse import Namespace

import pytest
import torch

from megatron_let.errors import UsageError
from megatron_let.methods.balance import MEMORY
from megatron_let.methods.ending import Ending, check_ending

FLAGS = Namespace(
    guidance_stop="loss",
    guidance_margin=0.0,
    guidance_patience=2,
    guidance_ramp=4,
    train_iters=100,
    kd_temperature=1.0,
    method="salt",
    lr_warmup_iters=0,
    lr_warmup_fraction=None,
    lr_warmup_samples=0,
    lr_decay_iters=None,
    lr_decay_samples=None,
    train_samples=None,
    global_batch_size=8,
    step_batch_size_schedule=None,
    consumed_train_samples=0,
)


def changed(**changes):
    return Namespace(**vars(FLAGS) | changes)


def ended(values, flags=FLAGS):
    """The step in which the weights begin to fall, what is said, and who says it."""
    ending = Ending(flags)
    for step, value in enumerate(values, 1):
        flags.consumed_train_samples = 8 * step
        why = ending.learn(step, torch.tensor([value]))
        if why:
            return step, why, ending
    return None, None, ending


def test_it_ends_after_the_patience_by_a_ramp():
    step, why, ending = ended([-0.5, -0.5, -0.5, -0.5])
    assert step == 3  # read a step later: the second low one at the third step
    assert why.startswith("step 3: the student's loss less the teacher's has come down to -0.5000")
    assert [ending.factor(s) for s in range(2, 8)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def test_one_that_comes_back_begins_the_patience_anew():
    average, values, crossing = 1.0, [1.0] + [-0.5] * 60, None
    for step, value in enumerate(values[1:], 2):
        average = MEMORY * average + (1 - MEMORY) * value
        if crossing is None and average <= 0:
            crossing = step
    assert ended(values)[0] == crossing + 2
    assert ended([-1.0, 30.0, -1.0, -1.0, -1.0])[0] is None


def test_a_step_that_is_not_finite_changes_nothing():
    _, _, one = ended([0.3])
    _, _, other = ended([0.3, torch.nan, torch.inf])
    assert one.state()["average"] == other.state()["average"]
    assert ended([torch.nan] + [-0.5] * 4)[0] == 4


@pytest.mark.parametrize(
    "warm_up",
    [
        {"lr_warmup_iters": 5},
        {"lr_warmup_fraction": 0.05},
        {"lr_warmup_fraction": 0.0},
        {"lr_warmup_samples": 40, "train_iters": None, "train_samples": 800},
        {"lr_warmup_fraction": 0.05, "train_iters": None, "train_samples": 800},
    ],
)
def test_nothing_is_judged_in_the_warm_up_of_the_learning_rate(warm_up):
    begun = 5 if warm_up != {"lr_warmup_fraction": 0.0} else 0
    assert ended([-0.5] * 20, changed(**warm_up))[0] == begun + 3


def test_a_margin_ends_it_earlier():
    assert ended([0.5] * 5)[0] is None
    assert ended([0.5] * 5, changed(guidance_margin=0.6))[0] == 3


def test_a_measure_that_comes_seldom_counts_for_the_steps_between():
    """The average forgets as fast as one of equal values in every step."""
    often, seldom = Ending(FLAGS), Ending(FLAGS)
    for step in range(1, 22):
        often.learn(step, torch.tensor(1.0 if step == 1 else -0.5))
        value = {1: 1.0, 11: -0.5, 21: -0.5}.get(step, torch.nan)
        seldom.learn(step, torch.tensor(value), every=10)
    assert seldom.state()["average"] == pytest.approx(often.state()["average"], rel=1e-5)


@pytest.mark.parametrize("cut", range(1, 7))
def test_its_state_goes_on_bit_for_bit(cut):
    values = [0.2, -3.0, -0.7, 0.1, -0.4, -0.3, -0.2]
    whole, first, second = (Ending(FLAGS) for _ in range(3))
    for step, value in enumerate(values, 1):
        whole.learn(step, torch.tensor(value))
        if step <= cut:
            first.learn(step, torch.tensor(value))
    second.load(first.state())
    for step, value in list(enumerate(values, 1))[cut:]:
        second.learn(step, torch.tensor(value))
    assert second.state() == whole.state()
    assert [second.factor(s) for s in range(12)] == [whole.factor(s) for s in range(12)]


def test_what_another_method_or_rule_has_seen_means_nothing():
    _, _, ending = ended([-0.5] * 4)
    for other in (changed(guidance_stop="step"), changed(method="reverse-kd")):
        fresh = Ending(other)
        fresh.load(ending.state())
        assert fresh.factor(50) == 1.0
        assert fresh.state() == {}


@pytest.mark.parametrize(
    ("changes", "measures", "words"),
    [
        ({"guidance_stop": "step"}, {"loss"}, "--guidance-patience has no effect without"),
        ({"guidance_stop": "cosine"}, {"loss"}, "--guidance-stop cosine needs LET: --method let"),
        ({"guidance_patience": 0}, {"loss"}, "--guidance-patience 0 .* at least 1"),
        ({"guidance_patience": 101}, {"loss"}, "--guidance-patience 101 .*no longer than the run"),
        (
            {"guidance_patience": 101, "train_iters": None, "train_samples": 800},
            {"loss"},
            "--guidance-patience 101 .*no longer than the run",
        ),
        ({"guidance_ramp": 0}, {"loss"}, "--guidance-ramp 0 must be at least 1"),
        ({"guidance_margin": float("nan")}, {"loss"}, "--guidance-margin nan is no number"),
        ({"kd_temperature": 2.0}, {"loss"}, "--kd-temperature 2.0 gives the teacher another"),
    ],
)
def test_bad_flags(changes, measures, words):
    with pytest.raises(UsageError, match=words):
        check_ending(changed(**changes), measures)
    check_ending(FLAGS, {"loss"})
