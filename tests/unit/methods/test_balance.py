"""The weight that follows the gradients."""

import pytest
import torch

from megatron_let.methods.balance import LARGEST, MEMORY, Balance

CPU = torch.device("cpu")


def value(number):
    return torch.tensor([number], dtype=torch.float32)


def test_the_weight_makes_the_gradients_as_large_as_is_asked_for():
    balance = Balance(0.5, 0.1)
    assert balance.weight(CPU).item() == pytest.approx(0.1)  # nothing is known
    balance.update(value(16.0), value(4.0))  # |g_LM| = 4, |g_LET| = 2 at weight 1
    assert balance.weight(CPU).item() == pytest.approx(0.5 * 4 / 2)
    balance.update(value(36.0), value(4.0))
    lm = MEMORY * 16 + (1 - MEMORY) * 36
    assert balance.weight(CPU).item() == pytest.approx(0.5 * (lm / 4) ** 0.5)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 0.0])
def test_a_step_that_says_nothing_changes_nothing(bad):
    balance = Balance(1.0, 0.1)
    balance.update(value(bad), value(1.0))
    assert balance.weight(CPU).item() == pytest.approx(0.1)
    balance.update(value(9.0), value(1.0))
    before = balance.weight(CPU)
    balance.update(value(1.0), value(bad))
    assert torch.equal(balance.weight(CPU), before)


def test_an_alignment_without_gradient_has_a_bounded_weight():
    balance = Balance(1.0, 0.1)
    balance.update(value(9.0), value(1e-30))
    assert balance.weight(CPU).item() == LARGEST


def test_its_state_goes_on_bit_for_bit():
    one, other = Balance(1.0, 0.1), Balance(1.0, 0.1)
    one.update(value(0.1), value(0.3))
    other.load(one.state())
    for balance in (one, other):
        balance.update(value(0.7), value(0.11))
    assert torch.equal(one.weight(CPU), other.weight(CPU))
    other.load({})  # a checkpoint of before
    assert Balance(1.0, 0.1).state() == {}
