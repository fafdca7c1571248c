"""Tolerances: 1e-6 absolute where float32 rounds a sum of 64 products, 1e-5 for 4096."""

import numpy as np
import pytest
import torch

from megatron_let.losses.table import cosine


def states(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_own_states_give_cosine_one():
    own_SBH = states(0, 9, 2, 64)
    torch.testing.assert_close(cosine(own_SBH, own_SBH), torch.zeros(9, 2), atol=1e-6, rtol=0)


def test_states_shifted_by_one_position_do_not():
    own_SBH = states(0, 9, 2, 64)
    assert cosine(own_SBH[1:], own_SBH[:-1]).mean() > 0.5


def test_one_value_a_token_of_the_written_out_formula():
    student_SBH, teacher_SBH = states(0, 5, 3, 64), states(1, 5, 3, 64)
    loss_SB = cosine(student_SBH, teacher_SBH)
    assert loss_SB.shape == (5, 3)
    h, t = student_SBH.double().numpy(), teacher_SBH.double().numpy()
    norms = np.linalg.norm(h, axis=-1) * np.linalg.norm(t, axis=-1)
    np.testing.assert_allclose(loss_SB, 1 - (h * t).sum(-1) / norms, atol=1e-6)


def test_length_of_a_vector_does_not_matter_and_opposite_costs_two():
    student_SBH, teacher_SBH = states(0, 5, 3, 64), states(1, 5, 3, 64)
    torch.testing.assert_close(
        cosine(student_SBH, teacher_SBH), cosine(7 * student_SBH, 0.01 * teacher_SBH)
    )
    torch.testing.assert_close(cosine(student_SBH, -student_SBH), torch.full((5, 3), 2.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_float32(dtype):
    student_SBH = states(0, 4, 2, 4096, dtype=dtype)
    teacher_SBH = (student_SBH.float() + 0.05 * states(1, 4, 2, 4096)).to(dtype)
    loss_SB = cosine(student_SBH, teacher_SBH)
    exact_SB = 1 - torch.cosine_similarity(student_SBH.double(), teacher_SBH.double(), dim=-1)
    assert loss_SB.dtype == torch.float32
    torch.testing.assert_close(loss_SB.double(), exact_SB, atol=1e-5, rtol=0)
    # The twin: summed in half precision, the loss of nearly parallel vectors is rounding alone.
    halved_SB = 1 - torch.cosine_similarity(student_SBH, teacher_SBH, dim=-1)
    assert (halved_SB.double() - exact_SB).abs().max() > 1e-4


def test_a_zero_vector_gives_a_finite_loss_and_gradient():
    student_SBH = torch.zeros(1, 1, 8, requires_grad=True)
    cosine(student_SBH, states(1, 1, 1, 8)).sum().backward()
    assert student_SBH.grad.isfinite().all()
