"""Language-model loss and distillation in one cross-entropy, on vocabulary shards.

With student logits z, label x, teacher probabilities p_T (softmax of its logits over the
temperature) and the weight w, per token:

    L = (1 - w) * CE(onehot(x), softmax(z)) + w * CE(p_T, softmax(z))
      = CE((1 - w) * onehot(x) + w * p_T, softmax(z))          gradient: softmax(z) - target

(method.md, section 3.1; forward KL up to the teacher's entropy, which has no gradient.)

Every tensor-parallel rank holds a slice of the vocabulary. As in Megatron's own cross-entropy only
maxima and sums travel, two a token each, float32 logits are overwritten, and one buffer of their
size is kept for the backward pass: it holds the gradient, where Megatron's holds the softmax. The
teacher's logits exist for a few tokens at a time. Shapes: S sequence, B batch, N some tokens, V
local vocabulary, D teacher width.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class TeacherHead:
    """The rows of a teacher's language-model head that belong to this rank's slice."""

    weight_VD: torch.Tensor
    """Rows without a token (padding) may hold anything."""
    bias_V: torch.Tensor | None
    num_tokens: int
    """Rows of the slice that have a token; those behind them get probability zero."""
    first_id: int
    """Token id of the slice's first row."""
    temperature: float
    """What the teacher's logits are divided by."""


class TokenLosses(NamedTuple):
    """Losses per token `[S, B]`, in nats; the same on all ranks of the group."""

    total: torch.Tensor
    """What is minimised, up to the teacher's entropy: (1 - w) * lm + w * kd."""
    lm: torch.Tensor
    """CE of the labels."""
    kd: torch.Tensor
    """KL(p_T || p_student)."""
    teacher: torch.Tensor
    """CE of the labels by the teacher's probabilities."""


def distilled_cross_entropy(
    logits_SBV: torch.Tensor,
    labels_SB: torch.Tensor,
    states_SBD: torch.Tensor,
    head: TeacherHead,
    weight: float,
    group: Any,
    at_once: int,
) -> TokenLosses:
    """Return the losses of each token; only `total` carries a gradient, to the logits alone.

    Float32 logits are overwritten, as by Megatron's cross-entropy. `weight` is w, 0 to 1; the
    teacher's logits exist for `at_once` tokens at a time.
    """
    inputs = logits_SBV, labels_SB, states_SBD, head, weight, group, at_once
    return TokenLosses(*_DistilledCrossEntropy.apply(*inputs))


class _DistilledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_SBV: torch.Tensor,
        labels_SB: torch.Tensor,
        states_SBD: torch.Tensor,
        head: TeacherHead,
        weight: float,
        group: Any,
        at_once: int,
    ) -> tuple[torch.Tensor, ...]:
        gradient_NV = logits_SBV.detach().float().flatten(0, 1)
        labels_N, states_ND = labels_SB.flatten(), states_SBD.flatten(0, 1)
        losses = [
            _chunk(gradient, labels, states, head, weight, group)
            for gradient, labels, states in zip(
                *(every.split(at_once) for every in (gradient_NV, labels_N, states_ND)), strict=True
            )
        ]
        parts = zip(*losses, strict=True)
        lm, kd, teacher = (torch.cat(part).view_as(labels_SB) for part in parts)
        ctx.save_for_backward(gradient_NV)
        ctx.dtype = logits_SBV.dtype
        ctx.mark_non_differentiable(lm, kd, teacher)
        return (1 - weight) * lm + weight * kd, lm, kd, teacher

    @staticmethod
    def backward(ctx: Any, upstream_SB: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        [gradient_NV] = ctx.saved_tensors
        gradient_NV *= upstream_SB.flatten()[:, None]
        gradient_SBV = gradient_NV.view(*upstream_SB.shape, -1).to(ctx.dtype)
        return gradient_SBV, None, None, None, None, None, None


def _chunk(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    states_ND: torch.Tensor,
    head: TeacherHead,
    weight: float,
    group: Any,
) -> torch.Tensor:
    """Return student's loss, KL and teacher's loss of some tokens `[3, N]`.

    The gradient comes in their logits' place.
    """
    teacher_NV = torch.nn.functional.linear(states_ND, head.weight_VD, head.bias_V)
    teacher_NV[:, head.num_tokens :] = -torch.inf
    both = logits_NV, teacher_NV, head.temperature
    maxima_2N = _fused(_maxima, *both)
    dist.all_reduce(maxima_2N, op=dist.ReduceOp.MAX, group=group)
    sums_2N = _fused(_sums, *both, maxima_2N)
    dist.all_reduce(sums_2N, group=group)
    # A number would have the function compiled anew for each of its values.
    share = torch.full((), weight, device=logits_NV.device)
    normalizers_2N = maxima_2N + sums_2N.log()
    losses_3N = _fused(_finish, *both, normalizers_2N, labels_N - head.first_id, share)
    dist.all_reduce(losses_3N, group=group)
    return losses_3N


# --- on this rank's slice: a few passes over the logits where they are compiled, on a GPU ---------


def _maxima(logits_NV: torch.Tensor, teacher_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.stack([logits_NV.amax(-1), teacher_NV.amax(-1).float() / temperature])


def _sums(
    logits_NV: torch.Tensor, teacher_NV: torch.Tensor, temperature: float, maxima_2N: torch.Tensor
) -> torch.Tensor:
    student, teacher = maxima_2N[:, :, None]
    powers = logits_NV - student, teacher_NV.float() / temperature - teacher
    return torch.stack([power.exp().sum(-1) for power in powers])


def _finish(
    logits_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    temperature: float,
    normalizers_2N: torch.Tensor,
    local_labels_N: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    student, teacher = normalizers_2N[:, :, None]
    log_NV, log_target_NV = logits_NV - student, teacher_NV.float() / temperature - teacher
    target_NV = log_target_NV.exp()
    columns = torch.arange(logits_NV.size(1), device=logits_NV.device)
    is_label_NV = columns == local_labels_N[:, None]  # nowhere, if another rank has it
    lm_N, teacher_N = (
        -torch.where(is_label_NV, own_NV, 0.0).sum(-1) for own_NV in (log_NV, log_target_NV)
    )
    kd_N = (target_NV * (log_target_NV.clamp(min=-1e30) - log_NV)).sum(-1)
    logits_NV.copy_(log_NV.exp() - weight * target_NV - (1 - weight) * is_label_NV)
    return torch.stack([lm_N, kd_N, teacher_N])


def _fused(function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """The function of these, compiled on a GPU."""
    return (_compiled(function) if arguments[0].is_cuda else function)(*arguments)


@functools.cache
def _compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    # The same kernels in every run: a resumed one goes on bit for bit.
    return torch.compile(function, dynamic=False, options={"deterministic": True})
