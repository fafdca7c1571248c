"""Alignment losses. Shapes: S sequence, B batch, H hidden; N the loss's tokens.

Each returns the sum over this rank's tokens of a micro-batch. Its gradient is that of the sum over
the tokens of all ranks of `group`, among which the sequence is cut (None: it lies here whole).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any], torch.Tensor]
"""Of student `[S, B, H]`, teacher `[S, B, H]`, mask `[S, B]` and group."""

NORM_EPSILON = LOG_EPSILON = 1e-5


def cosine(student_SBH: torch.Tensor, teacher_SBH: torch.Tensor) -> torch.Tensor:
    """`1 - cos(student, teacher)` of every token, `[S, B]`, in float32 (LET, section 2.1).

    The paper minimises `-cos`; one more makes the loss non-negative and leaves the gradient as it
    is. Norms and dot product are float32 whatever the inputs are: half precision would round the
    small differences between nearly parallel vectors away.
    """
    return 1.0 - F.cosine_similarity(student_SBH.float(), teacher_SBH.float(), dim=-1)


def cosine_sum(
    student_SBH: torch.Tensor, teacher_SBH: torch.Tensor, mask_SB: torch.Tensor, group: Any
) -> torch.Tensor:
    """The sum of `cosine` over the mask."""
    return (cosine(student_SBH, teacher_SBH) * mask_SB).sum()


def log_sum(
    student_SBH: torch.Tensor, teacher_SBH: torch.Tensor, mask_SB: torch.Tensor, group: Any
) -> torch.Tensor:
    """Tokens times `log(1 + sum over features of (c - 1)^4 / eps)`: a variant of ours.

    c is the correlation of a feature's values in student and teacher over the tokens of the
    micro-batch. After Miles and Mikolajczyk (AAAI 2024), whose statistics are of a batch of images;
    the LET paper only names such a loss. Theirs is log(eps) more, and then negative.
    """
    is_token = mask_SB > 0
    student_NH, teacher_NH = student_SBH[is_token].float(), teacher_SBH[is_token].float()
    own = mask_SB.new_tensor(len(student_NH), dtype=torch.float32)
    everyones = _over(group, own)
    tokens = everyones.clamp(min=1)
    # The means carry no gradient: deviations from them sum to zero.
    means_2H = _over(group, torch.stack([student_NH.sum(0), teacher_NH.sum(0)]).detach()) / tokens
    student_NH, teacher_NH = student_NH - means_2H[0], teacher_NH - means_2H[1]
    products = (student_NH.square(), teacher_NH.square(), student_NH * teacher_NH)
    squares = _over(group, torch.stack([product.sum(0) for product in products])) / tokens
    norms_H = ((squares[0] + NORM_EPSILON) * (squares[1] + NORM_EPSILON)).sqrt()
    loss = torch.log1p((squares[2] / norms_H - 1).pow(4).sum() / LOG_EPSILON)
    # Every rank reports its tokens' share, and has the gradient of the whole.
    return loss.detach() * own + (loss - loss.detach()) * everyones


def _over(group: Any, own: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks; gradients reach what is this rank's own."""
    if group is None:
        return own
    total = own.detach().clone()
    torch.distributed.all_reduce(total, group=group)
    return own + (total - own.detach())


LOSSES: dict[str, Loss] = {"cosine": cosine_sum, "logsum": log_sum}
