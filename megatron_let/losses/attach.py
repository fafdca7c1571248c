"""Adds the alignment loss to the backward pass of an activation, whose values stay as they are.

The loss never travels to the last stage: layer K's activation is handed on unchanged, and when its
gradient comes back, the scaled gradient of the alignment loss is added to it. The same idea as
Megatron's `MoEAuxLossAutoScaler`, but the scale belongs to the micro-batch, not to a class, and the
gradient is computed at once, so that neither teacher states nor a graph wait for the backward pass.

Shapes: S sequence, B batch, H student's width, T teacher's width.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from megatron_let.errors import UsageError
from megatron_let.losses.table import OF_ALL_TOKENS, Loss


def interpolate(states_SBH: torch.Tensor, width: int) -> torch.Tensor:
    """1-D linear interpolation along the feature axis, `[S, B, width]` (method.md, 2.4).

    As an image with a row for each token, whose number stays: CUDA's kernel for one dimension
    takes a token after the other, and 16 times as long (3.4 ms instead of 0.2 for 8,192 tokens
    from 576 to 2,048 on an H100, with the same bits).
    """
    if states_SBH.size(-1) == width:
        return states_SBH
    image = states_SBH.flatten(0, -2)[None, None]
    resized = F.interpolate(image, (image.size(-2), width), mode="bilinear", align_corners=False)
    return resized.view(*states_SBH.shape[:-1], width)


class Resize(torch.nn.Module):
    """`[S, B, T]` to `[S, B, H]`, of a kind: `interpolate`, which has no parameters, or `linear`.

    A linear one owns its map, the only weights LET ever trains. The map starts from a generator of
    its own, so that a run with it and a run without draw the same student weights, and every
    tensor-parallel rank the same map.
    """

    def __init__(self, kind: str, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self._width = student_width
        self.weight: torch.nn.Parameter | None = None
        if kind == "linear":
            generator = torch.Generator().manual_seed(0)
            weight_HT = torch.randn(student_width, teacher_width, generator=generator)
            self.weight = torch.nn.Parameter(weight_HT / teacher_width**0.5)

    def forward(self, teacher_SBT: torch.Tensor) -> torch.Tensor:
        """Return the teacher's states in the student's width."""
        if self.weight is not None:
            return F.linear(teacher_SBT.to(self.weight.dtype), self.weight)
        return interpolate(teacher_SBT, self._width)


@dataclass
class Target:
    """What layer K is aligned with in one micro-batch; this rank's part of the sequence."""

    states_SBT: torch.Tensor
    """The teacher's states, S local tokens."""
    mask_SB: torch.Tensor
    """1.0 where the token counts in the language-model loss, else 0.0."""
    scale: torch.Tensor | None
    """Factor of the summed loss: weight x loss scale / (tokens x micro-batches); None: the loss is
    recorded, and nothing is added."""
    group: torch.distributed.ProcessGroup | None = None
    """The ranks that hold the other parts, for losses of all tokens together."""


class _AddGradient(torch.autograd.Function):
    """Identity whose backward adds a ready gradient: to the activation, and to a learned map."""

    @staticmethod
    def forward(
        ctx: Any,
        queue: "Queue[Any]",
        activation: torch.Tensor,
        gradient: torch.Tensor,
        weight: torch.Tensor | None,
        weight_gradient: torch.Tensor | None = None,
    ) -> torch.Tensor:
        ctx.queue = queue
        ctx.save_for_backward(gradient, weight_gradient)
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[Any, ...]:
        gradient, weight_gradient = ctx.saved_tensors
        ctx.queue.compare(upstream, gradient)
        return None, upstream + gradient, None, weight_gradient, None


class Queue[T]:
    """Micro-batches that wait for their loss with the teacher, and sums over those that had it."""

    def __init__(self) -> None:
        self.targets: deque[T] = deque()
        self.start_step()

    def __len__(self) -> int:
        return len(self.targets)

    def start_step(self) -> None:
        """Forget the last step's sums, and what an interrupted one may have left."""
        self.targets.clear()
        self.micro_batches = 0
        """With a loss in this step."""
        self.sums: dict[str, torch.Tensor] = {}
        """Scalars of this step, on this rank."""

    def push(self, target: T) -> None:
        """Queue the target of the micro-batch whose forward pass comes next."""
        self.targets.append(target)

    def compare(self, lm_gradient: torch.Tensor, let_gradient: torch.Tensor) -> None:
        """Add what tells how long the two gradients are, and how far apart they point."""
        lm, let = lm_gradient.float().flatten(), let_gradient.float().flatten()
        self.add(
            lm_gradient_square=lm.dot(lm),
            let_gradient_square=let.dot(let),
            gradient_product=lm.dot(let),
        )

    def add(self, **values: torch.Tensor) -> None:
        """Add detached scalars to their sums."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()


class Alignment(Queue[Target]):
    """A queue of targets and the attachment of their loss to layer K's output.

    `push` is called once per micro-batch before its forward pass; the layer calls `attach` in the
    one run of that micro-batch that builds a graph. Under full recomputation that is the run inside
    the backward pass, when the newest micro-batch is already another one: hence first in, first
    out, which holds for every schedule of Megatron within one model chunk.
    """

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self._loss = loss

    def attach(self, activation_SBH: torch.Tensor, resize: Resize) -> torch.Tensor:
        """Return the activation with the oldest target's loss in its backward pass.

        Without a target (an unguided step) the activation comes back as it is; a learned map then
        gets a zero gradient, since data-parallel buckets wait for every weight's.
        """
        weight = resize.weight
        if self.targets:
            target = self.targets.popleft()
            leaf = activation_SBH.detach().requires_grad_()
            total = (self._losses_SB(leaf, resize, target) * target.mask_SB).sum()
            self.micro_batches += 1
            self.add(loss=total, tokens=target.mask_SB.sum())
            scale = 0.0 if target.scale is None else target.scale
            wanted = [leaf] if weight is None else [leaf, weight]
            gradient, *others = torch.autograd.grad(total * scale, wanted)
            if target.scale is not None:
                return _AddGradient.apply(self, activation_SBH, gradient, weight, *others)
        return activation_SBH if weight is None else activation_SBH + 0.0 * weight.sum()

    def _losses_SB(
        self, activation_SBH: torch.Tensor, resize: Resize, target: Target
    ) -> torch.Tensor:
        if self._loss in OF_ALL_TOKENS:
            return self._loss(activation_SBH, target.states_SBT, target.mask_SB, target.group)
        losses_SB = self._loss(activation_SBH, resize(target.states_SBT))
        if losses_SB.shape != target.mask_SB.shape:  # which would be broadcast
            raise UsageError(
                f"The --let-loss of a --method-module returns {list(losses_SB.shape)} where it "
                f"must return a loss for each token, {list(target.mask_SB.shape)}: reduce the "
                "features alone, without keepdim."
            )
        return losses_SB
