"""LET-CCA on one process: what changes its value, and what must not. Its layouts: the contract."""

from types import SimpleNamespace

import pytest
import torch

from megatron_let.losses.canonical import cca

ALONE = SimpleNamespace(size=lambda: 1)
S, B, H, T = 64, 4, 6, 9
EVERY = torch.ones(S, B)


def states(seed, width):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(S, B, width, generator=generator)


def loss(student_SBH, teacher_SBT, mask_SB=EVERY):
    value_SB = cca(student_SBH, teacher_SBT, mask_SB, ALONE)
    assert value_SB.shape == (S, B)
    assert value_SB.unique().numel() == 1
    return value_SB[0, 0]


@pytest.mark.parametrize("width", [H, T, 3])
def test_a_linear_map_of_the_teacher_costs_nothing_at_any_width(width):
    teacher = states(0, T)
    student = teacher @ torch.randn(T, width, generator=torch.Generator().manual_seed(1)) + 5.0
    assert loss(student, teacher) < 0.03  # the ridge's share
    assert loss(states(2, width), teacher) > 0.9  # by chance T / (S B) is alike


def test_order_scale_and_length_of_features_do_not_matter():
    student, teacher = states(0, H) + states(1, T)[..., :H], states(1, T)
    scale_H = torch.logspace(-3, 3, H)
    torch.testing.assert_close(
        loss(student, teacher), loss((student * scale_H + 7.0)[..., torch.randperm(H)], teacher)
    )


def test_tokens_that_do_not_count_do_not_count():
    student, teacher = states(0, H), states(1, T)
    mask_SB = (torch.arange(S * B).view(S, B) % 3 > 0).float()
    noise = 100.0 * states(2, H) * (1 - mask_SB[..., None])
    torch.testing.assert_close(
        loss(student, teacher, mask_SB), loss(student + noise, teacher, mask_SB)
    )
    assert abs(loss(student, teacher, mask_SB) - loss(student, teacher)) > 1e-3


@pytest.mark.parametrize("mask_SB", [torch.zeros(S, B), EVERY.tril(-S + 1)], ids=["none", "one"])
def test_too_few_tokens_give_a_gradient_of_zeros(mask_SB):
    student = states(0, H).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(student, states(1, T), mask_SB), student)
    assert not gradient.any()


def test_a_step_along_the_gradient_brings_them_together():
    teacher = states(1, T)
    student = (states(0, H) + teacher[..., :H]).requires_grad_()
    before = loss(student, teacher)
    (gradient,) = torch.autograd.grad(before, student)
    after = loss(student - 50.0 * gradient, teacher)
    assert after < before - 0.01
