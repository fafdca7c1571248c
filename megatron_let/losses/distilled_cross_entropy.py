"""Language-model loss and distillation in one cross-entropy, on vocabulary shards.

With student logits z, label x, teacher probabilities p_T (softmax of its logits over the
temperature) and the weight w, per token:

    L = (1 - w) * CE(onehot(x), softmax(z)) + w * CE(p_T, softmax(z))
      = CE((1 - w) * onehot(x) + w * p_T, softmax(z))          gradient: softmax(z) - target

(method.md, section 3.1; forward KL up to the teacher's entropy, which has no gradient.)

Every tensor-parallel rank holds a slice of the vocabulary. As in Megatron's own cross-entropy only
maxima and sums travel, `[S, B]` each, float32 logits are overwritten, and one buffer of their size
is kept for the backward pass: it holds the gradient, where Megatron's holds the softmax. The
teacher's logits exist for a few tokens at a time. Shapes: S sequence, B batch, V local vocabulary,
D teacher width.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

CHUNK, PARTS = 512, 8
"""Tokens whose teacher logits exist at once: at most so many, and at most a part of all."""


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


def distilled_cross_entropy(
    logits_SBV: torch.Tensor,
    labels_SB: torch.Tensor,
    states_SBD: torch.Tensor,
    head: TeacherHead,
    weight: float,
    group: Any,
) -> TokenLosses:
    """Return the losses of each token; only `total` carries a gradient, to the logits alone.

    Float32 logits are overwritten, as by Megatron's cross-entropy. `weight` is w, 0 to 1.
    """
    return TokenLosses(
        *_DistilledCrossEntropy.apply(logits_SBV, labels_SB, states_SBD, head, weight, group)
    )


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
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gradient_NV = logits_SBV.detach().float().flatten(0, 1)
        labels_N, states_ND = labels_SB.flatten(), states_SBD.flatten(0, 1)
        chunk = min(CHUNK, math.ceil(len(labels_N) / PARTS))
        losses = [
            _chunk(gradient, labels, states, head, weight, group)
            for gradient, labels, states in zip(
                gradient_NV.split(chunk), labels_N.split(chunk), states_ND.split(chunk), strict=True
            )
        ]
        lm, kd = (torch.cat(parts).view_as(labels_SB) for parts in zip(*losses, strict=True))
        ctx.save_for_backward(gradient_NV)
        ctx.dtype = logits_SBV.dtype
        ctx.mark_non_differentiable(lm, kd)
        return (1 - weight) * lm + weight * kd, lm, kd

    @staticmethod
    def backward(ctx: Any, upstream_SB: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        [gradient_NV] = ctx.saved_tensors
        gradient_NV *= upstream_SB.flatten()[:, None]
        gradient_SBV = gradient_NV.view(*upstream_SB.shape, -1).to(ctx.dtype)
        return gradient_SBV, None, None, None, None, None


def _chunk(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    states_ND: torch.Tensor,
    head: TeacherHead,
    weight: float,
    group: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return LM loss and KL of some tokens; put the gradient in the place of their logits."""
    target_NV, log_target_NV = _teacher_probabilities(states_ND, head, group)
    entropy_N = -(target_NV * log_target_NV.clamp(min=-1e30)).sum(-1)
    logits_NV.copy_(_log_softmax(logits_NV, group))  # from here on log-probabilities
    cross_N = -(target_NV * logits_NV).sum(-1)

    rows = torch.arange(len(labels_N), device=labels_N.device)
    local_N = labels_N - head.first_id
    is_here_N = (local_N >= 0) & (local_N < logits_NV.size(1))
    local_N = local_N.clamp(0, logits_NV.size(1) - 1)
    lm_N = -logits_NV[rows, local_N] * is_here_N
    sums = torch.stack([lm_N, cross_N - entropy_N])
    dist.all_reduce(sums, group=group)

    logits_NV.exp_().sub_(target_NV, alpha=weight)
    logits_NV[rows, local_N] -= (1 - weight) * is_here_N
    return sums[0], sums[1]


def _teacher_probabilities(
    states_ND: torch.Tensor, head: TeacherHead, group: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    logits_NV = torch.nn.functional.linear(states_ND, head.weight_VD, head.bias_V).float()
    logits_NV[:, head.num_tokens :] = -torch.inf
    log_NV = _log_softmax(logits_NV / head.temperature, group)
    return log_NV.exp(), log_NV


def _log_softmax(logits_NV: torch.Tensor, group: Any) -> torch.Tensor:
    """Log-softmax over the whole vocabulary, of which each rank has a slice."""
    maximum_N = logits_NV.amax(-1)
    dist.all_reduce(maximum_N, op=dist.ReduceOp.MAX, group=group)
    shifted_NV = logits_NV - maximum_N[:, None]
    sum_N = shifted_NV.exp().sum(-1)
    dist.all_reduce(sum_N, group=group)
    return shifted_NV - sum_N.log()[:, None]
