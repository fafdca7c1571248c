"""LET-CCA: how much of the student's states linear maps could read off the teacher's.

The paper names it (arXiv 2602.05393) and gives no formula: this one is ours. It asks for no order
of the features and no width, but for many more tokens than features (docs/methods.md).
"""

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)

RIDGE = 1e-3
"""Of a feature's variance, added to it: without, noise would count as much as what is said."""
SMALLEST = 1e-12
"""Sum of squares of a feature that never changes."""


def cca(
    student_SBH: torch.Tensor,
    teacher_SBT: torch.Tensor,
    mask_SB: torch.Tensor,
    group: torch.distributed.ProcessGroup,
) -> torch.Tensor:
    """One less the mean squared canonical correlation, the same for every token, `[S, B]`.

    `1 - |M|^2 / min(H, T)` with `M = R_ss^(-1/2) R_st R_tt^(-1/2)` of the correlations over the
    tokens that count of the whole micro-batch, which the ranks of `group` hold together; float32.
    """
    width, other = student_SBH.size(-1), teacher_SBT.size(-1)
    states_NF = torch.cat([student_SBH.float(), teacher_SBT.float()], dim=-1).flatten(0, 1)
    correlation_FF = _correlation(states_NF, mask_SB.flatten(), group)
    blocks = correlation_FF[:width, :width], correlation_FF[width:, width:]
    # Without a check, which would wait for the device.
    factor_HH, factor_TT = (torch.linalg.cholesky_ex(block)[0] for block in blocks)
    half_HT = torch.linalg.solve_triangular(factor_HH, correlation_FF[:width, width:], upper=False)
    whitened_TH = torch.linalg.solve_triangular(factor_TT, half_HT.T, upper=False)
    return (1.0 - whitened_TH.square().sum() / min(width, other)).expand(mask_SB.shape)


def _correlation(
    states_NF: torch.Tensor, counts_N: torch.Tensor, group: torch.distributed.ProcessGroup
) -> torch.Tensor:
    """Of all features with all, over the group's tokens that count; its diagonal is 1 + RIDGE."""
    with torch.no_grad():  # no gradient comes through the mean: the centred states sum up to zero
        ones_N1 = states_NF.new_ones(len(states_NF), 1)
        sums_F1 = _summed(counts_N @ torch.cat([states_NF, ones_N1], dim=1), group)
        mean_F = sums_F1[:-1] / sums_F1[-1].clamp(min=1)
    centred_NF = (states_NF - mean_F) * counts_N[:, None]
    covariance_FF = _summed(centred_NF.T @ centred_NF, group)
    scale_F = covariance_FF.diagonal().clamp(min=SMALLEST).rsqrt()
    correlation_FF = covariance_FF * scale_F[:, None] * scale_F
    return correlation_FF + RIDGE * torch.eye(len(scale_F), device=scale_F.device)


def _summed(values: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """The sum over the ranks, whose gradient is the sum of theirs, too."""
    if group.size() == 1:
        return values
    return copy_to_tensor_model_parallel_region(
        reduce_from_tensor_model_parallel_region(values, group), group
    )
