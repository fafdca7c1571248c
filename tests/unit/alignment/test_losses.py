"""Tolerances: 1e-6 absolute where float32 rounds a sum of 64 products, 1e-5 for 4096."""

import numpy as np
import pytest
import torch

from megatron_let.alignment.losses import LOSSES, cosine, log_sum


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


def written_out(student_NH, teacher_NH):
    """The log-sum loss with numpy's own correlation."""
    pairs = zip(student_NH.double().numpy().T, teacher_NH.double().numpy().T, strict=True)
    correlations = np.array([np.corrcoef(s, t)[0, 1] for s, t in pairs])
    return np.log(1 + ((correlations - 1) ** 4).sum() / 1e-5)


def test_log_sum_is_the_written_out_formula_of_the_masks_tokens():
    student_SBH, teacher_SBH = states(0, 6, 3, 16), states(1, 6, 3, 16)
    mask_SB = (states(2, 6, 3) > 0).float()
    kept = mask_SB > 0
    loss = log_sum(student_SBH, teacher_SBH, mask_SB, None) / mask_SB.sum()
    expected = written_out(student_SBH[kept], teacher_SBH[kept])
    assert loss.item() == pytest.approx(expected, abs=1e-3)  # the norms' epsilon


def test_log_sum_wants_correlation_and_not_equality():
    own_SBH, mask_SB = states(0, 6, 3, 16), torch.ones(6, 3)
    best = log_sum(own_SBH, 3 * own_SBH + 5, mask_SB, None) / 18
    assert best.item() == pytest.approx(0.0, abs=0.1)
    assert log_sum(own_SBH, states(1, 6, 3, 16), mask_SB, None) / 18 > 5


def test_log_sum_without_tokens_is_nothing():
    student_SBH = states(0, 2, 1, 8).requires_grad_()
    loss = log_sum(student_SBH, states(1, 2, 1, 8), torch.zeros(2, 1), None)
    loss.backward()
    assert loss.item() == 0 and not student_SBH.grad.any()


def test_default_is_the_masked_sum_of_cosines():
    student_SBH, teacher_SBH = states(0, 5, 3, 64), states(1, 5, 3, 64)
    mask_SB = (states(2, 5, 3) > 0).float()
    expected = (cosine(student_SBH, teacher_SBH) * mask_SB).sum()
    assert LOSSES["cosine"](student_SBH, teacher_SBH, mask_SB, None) == expected
