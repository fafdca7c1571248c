"""The classic wrong factors, injected into one built student; each changes instances only."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches

Fault = Callable[[Any, list[Any]], None]


def _scaled(factor: Callable[[], float]) -> Fault:
    def inject(method: Any, chunks: list[Any]) -> None:
        right = method._loss_scale
        method._loss_scale = lambda num_tokens: right(num_tokens) * factor()

    return inject


def _mean_over_the_slice(method: Any, chunks: list[Any]) -> None:
    """Divide by the tokens of this rank's slice of the sequence, not by the micro-batch's."""
    push = method.alignment.push
    right = method._loss_scale
    method._loss_scale = lambda num_tokens: right(torch.ones_like(num_tokens))

    def push_mean(target: Any) -> None:
        target.scale = target.scale / target.mask_SB.sum().clamp(min=1)
        push(target)

    method.alignment.push = push_mean


def _unmarked_norm(method: Any, chunks: list[Any]) -> None:
    """A norm that does not say that its gradient is a partial sum."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if "norm" in name:
                parameter.sequence_parallel = False


def _counted_twice(method: Any, chunks: list[Any]) -> None:
    """The loss of a recomputed layer attached in both of its runs."""
    attach = method.alignment.attach

    def attach_twice(activation: torch.Tensor, resize: Any) -> torch.Tensor:
        targets = method.alignment._targets
        if targets:
            targets.appendleft(targets[0])
            activation = attach(activation, resize)
        return attach(activation, resize)

    method.alignment.attach = attach_twice
    method._check_every_micro_batch = lambda recorded: None


class _LastInFirstOut(deque):  # type: ignore[type-arg]
    def popleft(self) -> Any:
        return self.pop()


def _newest_micro_batch(method: Any, chunks: list[Any]) -> None:
    """Align with the newest micro-batch's states, not with the layer's own."""
    method.alignment._targets = _LastInFirstOut()


FAULTS: dict[str, Fault] = {
    "micro_batch_factor": _scaled(lambda: float(get_num_microbatches())),
    "tensor_parallel_factor": _scaled(lambda: 1 / mpu.get_tensor_model_parallel_world_size()),
    "mean_over_the_slice": _mean_over_the_slice,
    "unmarked_norm": _unmarked_norm,
    "counted_twice": _counted_twice,
    "newest_micro_batch": _newest_micro_batch,
}
