"""Language-model loss and distillation in one cross-entropy, on vocabulary shards.

With student logits z, label x, teacher probabilities p_T (softmax of its logits over the
temperature) and the weight w, per token:

    L = (1 - w) * CE(onehot(x), softmax(z)) + w * CE(p_T, softmax(z))
      = CE((1 - w) * onehot(x) + w * p_T, softmax(z))          gradient: softmax(z) - target

(method.md, section 3.1; forward KL up to the teacher's entropy, which has no gradient.)
With a gate w is zero on the tokens whose label the teacher predicts no better than the student.

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
    is_better: torch.Tensor
    """1.0 where that is less than the student's, else 0.0."""


def distilled_cross_entropy(
    logits_SBV: torch.Tensor,
    labels_SB: torch.Tensor,
    states_SBD: torch.Tensor,
    head: TeacherHead,
    weight: float,
    group: Any,
    at_once: int,
    gated: bool = False,
) -> TokenLosses:
    """Return the losses of each token; only `total` carries a gradient, to the logits alone.

    Float32 logits are overwritten, as by Megatron's cross-entropy. `weight` is w, 0 to 1, `gated`
    on the tokens alone on which the teacher is better; the teacher's logits exist for `at_once`
    tokens at a time.
    """
    with torch.no_grad():
        gradient_NV = logits_SBV.detach().float().flatten(0, 1)
        inputs = gradient_NV, labels_SB.flatten(), states_SBD.flatten(0, 1)
        chunks = zip(*(every.split(at_once) for every in inputs), strict=True)
        losses = [
            _chunk(logits, labels, states, head, weight, group, gated)
            for logits, labels, states in chunks
        ]
        parts = zip(*losses, strict=True)
        lm, kd, teacher = (torch.cat(part).view_as(labels_SB) for part in parts)
        is_better = _is_better(lm, teacher)
        share = weight * is_better if gated else weight
        total = (1 - share) * lm + share * kd
    total = _WithGradient.apply(total, logits_SBV, gradient_NV)
    return TokenLosses(total, lm, kd, teacher, is_better)


class _WithGradient(torch.autograd.Function):
    """Losses per token whose gradients, one of each alone, are there already."""

    @staticmethod
    def forward(
        ctx: Any, total_SB: torch.Tensor, logits_SBV: torch.Tensor, gradient_NV: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(gradient_NV)
        ctx.dtype = logits_SBV.dtype
        return total_SB

    @staticmethod
    def backward(ctx: Any, upstream_SB: torch.Tensor) -> tuple[Any, ...]:
        [gradient_NV] = ctx.saved_tensors
        gradient_NV *= upstream_SB.flatten()[:, None]
        return None, gradient_NV.view(*upstream_SB.shape, -1).to(ctx.dtype), None


def _chunk(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    states_ND: torch.Tensor,
    head: TeacherHead,
    weight: float,
    group: Any,
    gated: bool,
) -> torch.Tensor:
    """Student's loss, KL and teacher's loss `[3, N]`; the gradient comes in the logits' place."""
    teacher_NV = torch.nn.functional.linear(states_ND, head.weight_VD, head.bias_V)
    teacher_NV[:, head.num_tokens :] = -torch.inf
    both = logits_NV, teacher_NV, head.temperature
    local_labels_N = labels_N - head.first_id
    maxima_2N = _fused(_maxima, *both)
    dist.all_reduce(maxima_2N, op=dist.ReduceOp.MAX, group=group)
    sums_4N = _fused(_sums, *both, maxima_2N, local_labels_N)
    dist.all_reduce(sums_4N, group=group)
    normalizers_2N = maxima_2N + sums_4N[:2].log()
    lm_N, teacher_N = normalizers_2N - sums_4N[2:]
    # A number would have the function compiled anew for each of its values.
    share_N = torch.full_like(lm_N, weight) * (_is_better(lm_N, teacher_N) if gated else 1)
    kd_N = _fused(_finish, *both, normalizers_2N, local_labels_N, share_N)
    dist.all_reduce(kd_N, group=group)
    return torch.stack([lm_N, kd_N, teacher_N])


def _is_better(lm: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (teacher < lm).float()


# --- on this rank's slice: a few passes over the logits where they are compiled, on a GPU ---------


def _maxima(logits_NV: torch.Tensor, teacher_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.stack([logits_NV.amax(-1), teacher_NV.amax(-1).float() / temperature])


def _is_label(local_labels_N: torch.Tensor, logits_NV: torch.Tensor) -> torch.Tensor:
    """Where a token's label is `[N, V]`: nowhere, if another rank has it."""
    return torch.arange(logits_NV.size(1), device=logits_NV.device) == local_labels_N[:, None]


def _sums(
    logits_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    temperature: float,
    maxima_2N: torch.Tensor,
    local_labels_N: torch.Tensor,
) -> torch.Tensor:
    """Of the powers, student's and teacher's, and of the labels' logits; `[4, N]`."""
    is_label_NV = _is_label(local_labels_N, logits_NV)
    both = logits_NV, teacher_NV.float() / temperature
    powers = [(every - most[:, None]).exp() for every, most in zip(both, maxima_2N, strict=True)]
    labels = [torch.where(is_label_NV, every, 0.0) for every in both]
    return torch.stack([every.sum(-1) for every in (*powers, *labels)])


def _finish(
    logits_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    temperature: float,
    normalizers_2N: torch.Tensor,
    local_labels_N: torch.Tensor,
    share_N: torch.Tensor,
) -> torch.Tensor:
    student, teacher = normalizers_2N[:, :, None]
    log_NV, log_target_NV = logits_NV - student, teacher_NV.float() / temperature - teacher
    target_NV = log_target_NV.exp()
    kd_N = (target_NV * (log_target_NV.clamp(min=-1e30) - log_NV)).sum(-1)
    share, is_label_NV = share_N[:, None], _is_label(local_labels_N, logits_NV)
    logits_NV.copy_(log_NV.exp() - share * target_NV - (1 - share) * is_label_NV)
    return kd_N


def _fused(function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """The function of these, compiled on a GPU."""
    return (_compiled(function) if arguments[0].is_cuda else function)(*arguments)


@functools.cache
def _compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    # The same kernels in every run: a resumed one goes on bit for bit.
    return torch.compile(function, dynamic=False, options={"deterministic": True})
