from argparse import Namespace

import pytest

from megatron_let.upstream import loop_hooks
from megatron_let.upstream.loop_hooks import Listener, LoopHooks, Step


class Average(Listener):
    """What a user may want twice, with other constants."""

    def __init__(self, value):
        self.value = value

    def on_load(self, state):
        self.value = state["value"]

    def state(self):
        return {"value": self.value}


def hooks_with(*listeners):
    hooks = LoopHooks(Namespace())
    hooks.listeners = list(listeners)
    return hooks


def test_each_of_two_listeners_of_a_class_gets_its_own_state_back():
    saved = Namespace(listener_states=hooks_with(Average(0.9), Average(0.99))._states())
    listeners = Average(0.0), Average(0.0)
    hooks_with(*listeners).on_load(saved)
    assert [listener.value for listener in listeners] == [0.9, 0.99]
    # The twin: a checkpoint of a single one is as it always was.
    assert hooks_with(Average(0.9))._states() == {"Average": {"value": 0.9}}


def test_megatron_gets_what_it_can_take_the_mean_of():
    """Over three steps: of a name in each the sum so far, of one at the end alone nothing."""
    hooks = LoopHooks(Namespace(log_interval=3, tensorboard_log_interval=1))
    totals = {"advanced iterations": 0}
    for number in (1, 2, 3):
        step = Step(number, losses={}, grad_norm=None, learning_rate=None, is_skipped=False)
        step.reported = {"always": number} | ({"seldom": 7} if number in (1, 3) else {})
        hooks._log_reported(step, totals)
        totals["advanced iterations"] += 1
    assert totals == {"advanced iterations": 3, "always": 1 + 2}
    assert step.losses == {"always": 3}  # which Megatron adds


@pytest.mark.parametrize("number", [3, 4])
def test_the_end_of_the_run_is_no_stop_before_it(number, monkeypatch):
    """By --exit-interval or --exit-duration-in-mins, after which nothing is evaluated."""
    monkeypatch.setattr(loop_hooks, "is_last_rank", lambda: False)
    args = Namespace(train_iters=4, exit_interval=2, exit_duration_in_mins=5)

    def training_log(loss_dict, iteration, grad_norm, learning_rate, skipped_iter):
        """As Megatron's."""

    LoopHooks(args)._log(training_log, {}, number, 1.0, 0.1, skipped_iter=0)
    stops = (args.exit_interval, args.exit_duration_in_mins)
    assert stops == ((2, 5) if number < 4 else (None, None))


def test_a_checkpoint_is_written_once_where_nothing_was_done_since(tmp_path):
    args = Namespace(save=str(tmp_path), iteration=0, train_iters=9, curr_iteration=3)
    args.async_save = False
    hooks, written = LoopHooks(args), []

    def save(step):
        hooks._save(lambda step, *_: written.append(step), step, [], None)

    save(4)
    save(4)  # as where batches grow, and at the run's end
    assert written == [4]
    args.curr_iteration = 4  # a step that was bad: what is saved tells the next start of it
    save(4)
    assert written == [4, 4]
    args.save = None  # which Megatron does not look at there
    save(5)
    assert written == [4, 4]


def test_the_checkpoint_of_a_complete_run_stays_as_it_is(tmp_path):
    args = Namespace(save=str(tmp_path), iteration=9, train_iters=9, curr_iteration=0)
    args.async_save = False
    written = []
    for _ in range(2):  # two starts
        LoopHooks(args)._save(lambda step, *_: written.append(step), 9, [], None)
        (tmp_path / "iter_0000009").mkdir(exist_ok=True)
        (tmp_path / "iter_0000009" / "metadata.json").touch()
    assert written == [9]
