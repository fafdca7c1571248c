"""`--guidance auto` fills in what is not given, and refuses where it can choose nothing."""

from argparse import Namespace

import pytest

from megatron_let.errors import UsageError
from megatron_let.methods.auto import choices, choose

FLAGS = Namespace(
    method="let+salt",
    train_iters=1000,
    train_samples=None,
    global_batch_size=8,
    step_batch_size_schedule=None,
    let_decay="linear",
    let_weight_rule="fixed",
    let_gradient_ratio=1.0,
    let_stop_step=None,
    let_resize="interpolate",
    kd_token_gate=False,
    kd_stop_step=None,
    guidance_stop="step",
    guidance_patience=20,
)


def chosen(given=(), **changes):
    args = Namespace(**vars(FLAGS) | changes)
    choose(args, ["--guidance", "auto", *given])
    return args


def test_weight_course_and_end_are_chosen_and_said():
    assert choices(chosen()) == (
        "--let-weight-rule ratio --let-stop-step 500 --let-gradient-ratio 0.5 "
        "--kd-token-gate --kd-stop-step 500 --guidance-stop loss --guidance-patience 20"
    )
    let, salt = (chosen(method=name) for name in ("let", "salt"))
    assert (let.guidance_stop, let.kd_token_gate, let.let_stop_step) == ("step", False, 500)
    assert (salt.guidance_stop, salt.kd_stop_step, salt.let_stop_step) == ("loss", 500, None)
    assert chosen(train_iters=None, train_samples=80).let_stop_step == 5


def test_what_is_given_counts():
    given = "--let-weight-rule fixed --let-stop-step=7 --no-kd-token-gate --guidance-stop step"
    args = chosen(given.split(), let_stop_step=7)
    assert choices(args) == ("--let-weight-rule fixed --let-stop-step 7 --kd-stop-step 500")
    assert (args.let_gradient_ratio, args.guidance_patience) == (1.0, 20)  # else without effect
    assert choices(chosen(method="let", let_decay="constant")) == (
        "--let-weight-rule ratio --let-gradient-ratio 0.5"
    )


def test_a_length_that_megatron_fills_in_is_waited_for():
    args = chosen(train_iters=None, train_samples=800, global_batch_size=None)
    assert (args.let_stop_step, args.let_weight_rule) == (None, "ratio")


def test_a_run_without_a_length_in_steps_needs_its_ends_alone():
    given = ["--let-stop-step", "7", "--kd-stop-step", "9"]
    args = chosen(given, train_iters=None, let_stop_step=7, kd_stop_step=9)
    assert (args.let_stop_step, args.kd_stop_step, args.kd_token_gate) == (7, 9, True)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"method": "reverse-kd"}, "--method reverse-kd distils during the whole run: use"),
        ({"let_resize": "linear"}, "Use --let-resize interpolate, or give --let-weight-rule fixed"),
        ({"train_iters": None}, "needs the run's length: --train-iters, or --let-stop-step"),
    ],
)
def test_where_nothing_can_be_chosen_it_is_refused(changes, why):
    with pytest.raises(UsageError, match=why):
        chosen(**changes)
