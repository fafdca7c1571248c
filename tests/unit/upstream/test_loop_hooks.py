from argparse import Namespace

from megatron_let.upstream.loop_hooks import Listener, LoopHooks


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
