"""The classic wrong factors, injected into one built student; each changes instances only."""

import dataclasses
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import make_viewless_tensor, unwrap_model

from megatron_let.losses import distilled_cross_entropy
from megatron_let.losses.attach import Alignment
from megatron_let.losses.table import cosine

Fault = Callable[[Any, list[Any]], None]


def _scaled(factor: Callable[[], float]) -> Fault:
    def inject(method: Any, chunks: list[Any]) -> None:
        signal = method.signals[0]
        right = signal._loss_scale
        signal._loss_scale = lambda num_tokens: right(num_tokens) * factor()

    return inject


def _mean_over_the_slice(method: Any, chunks: list[Any]) -> None:
    """Divide by the tokens of this rank's slice of the sequence, not by the micro-batch's."""
    signal = method.signals[0]
    push = signal.alignment.push
    right = signal._loss_scale
    signal._loss_scale = lambda num_tokens: right(torch.ones_like(num_tokens))

    def push_mean(target: Any) -> None:
        target.scale = target.scale / target.mask_SB.sum().clamp(min=1)
        push(target)

    signal.alignment.push = push_mean


def _unmarked_norm(method: Any, chunks: list[Any]) -> None:
    """A norm that does not say that its gradient is a partial sum."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if "norm" in name:
                parameter.sequence_parallel = False


def _counted_twice(method: Any, chunks: list[Any]) -> None:
    """The loss of a recomputed layer attached in both of its runs."""
    signal = method.signals[0]
    attach = signal.alignment.attach

    def attach_twice(activation: torch.Tensor, resize: Any) -> torch.Tensor:
        targets = signal.alignment.targets
        if targets:
            targets.appendleft(targets[0])
            activation = attach(activation, resize)
        return attach(activation, resize)

    signal.alignment.attach = attach_twice
    method.check_every_micro_batch = lambda signal: None


class _LastInFirstOut(deque):  # type: ignore[type-arg]
    def popleft(self) -> Any:
        return self.pop()


def _newest_micro_batch(method: Any, chunks: list[Any]) -> None:
    """Align with the newest micro-batch's states, not with the layer's own."""
    signal = method.signals[0]
    signal.alignment.targets = _LastInFirstOut()


def _per_micro_batch_mean(method: Any, chunks: list[Any]) -> None:
    """Divide as for a mean over each micro-batch although the loss is per token."""
    signal = method.signals[0]
    right = signal._loss_scale
    signal._loss_scale = lambda num_tokens: (
        right(num_tokens) / (num_tokens * get_num_microbatches())
    )


def _unmarked_map(method: Any, chunks: list[Any]) -> None:
    """A learned map that does not say that its gradient is a partial sum."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if "let_resize" in name:
                parameter.sequence_parallel = False


def _index_without_virtual_stage(method: Any, chunks: list[Any]) -> None:
    """Align the layer at K's index in the rank's first chunk, although K lies in another."""
    signal = method.signals[0]
    if not signal.owner_chunks:
        return
    wrong, right = (unwrap_model(chunk).decoder.layers[0] for chunk in chunks)
    right.alignment = Alignment(cosine)
    signal.owner_chunks = {0}

    def attach(_layer: Any, _inputs: Any, output: Any) -> Any:
        hidden = signal.alignment.attach(output[0], right.let_resize)
        return make_viewless_tensor(hidden, requires_grad=True, keep_graph=True), output[1]

    wrong.register_forward_hook(attach)


def _no_loss_mask(method: Any, chunks: list[Any]) -> None:
    """The owner stage takes every token, as if it had not been sent the loss mask."""
    right = method.before_forward

    def all_tokens(batches: list[dict[str, torch.Tensor]], vp_stage: int | None) -> None:
        whole = [batch | {"loss_mask": torch.ones_like(batch["loss_mask"])} for batch in batches]
        right(whole, vp_stage)

    method.before_forward = all_tokens


def _view_from_the_last_layer(method: Any, chunks: list[Any]) -> None:
    """The aligned layer hands on a view, which Megatron cannot free after sending."""
    for chunk in chunks:
        for layer in unwrap_model(chunk).decoder.layers:
            if "let_resize" in dict(layer.named_children()):
                layer.register_forward_hook(lambda _, __, out: (out[0].view_as(out[0]), out[1]))


def _rows_of_another_rank(method: Any, chunks: list[Any]) -> None:
    """The rows of a split teacher put together in the wrong order."""
    right = method.host.states
    method.host.states = lambda *given, **named: [
        states.roll(1, dims=1) for states in right(*given, **named)
    ]


def _tokens_of_the_whole_sequence(method: Any, chunks: list[Any]) -> None:
    """Divide by the micro-batch's tokens on all context-parallel ranks, not by this rank's."""
    signal = method.signals[0]
    right = signal._loss_scale

    def whole(num_tokens: torch.Tensor) -> torch.Tensor:
        everyones = num_tokens.clone()
        torch.distributed.all_reduce(everyones, group=mpu.get_context_parallel_group())
        return right(everyones)

    signal._loss_scale = whole


def _contiguous_context_slices(method: Any, chunks: list[Any]) -> None:
    """Cut the sequence into contiguous parts, where Megatron pairs chunks of both ends."""
    rank, ranks = mpu.get_context_parallel_rank(), mpu.get_context_parallel_world_size()
    right = method.host.states

    def cut(batches: list[Any], *, sliced: bool) -> list[torch.Tensor]:
        states = torch.stack(right(batches, sliced=sliced))
        parts = [torch.empty_like(states) for _ in range(ranks)]
        torch.distributed.all_gather(parts, states, group=mpu.get_context_parallel_group())
        ends = [part.chunk(2, dim=1) for part in parts]
        whole = [ends[i][0] for i in range(ranks)] + [ends[i][1] for i in reversed(range(ranks))]
        return list(torch.cat(whole, dim=1).chunk(ranks, dim=1)[rank].contiguous())

    method.host.states = cut


def _documents_ignored(method: Any, chunks: list[Any]) -> None:
    """The teacher reads a row as one document where the student keeps two apart."""
    method.host._rows = lambda batches: {
        "tokens": torch.cat([batch["tokens"] for batch in batches])
    }


def _padding_kept(method: Any, chunks: list[Any]) -> None:
    """Rows of the teacher's head that stand for no token take part in its softmax."""
    signal = method.signals[0]
    signal._head = dataclasses.replace(signal._head, num_tokens=len(signal._head.weight_VD))


def _head_rows_shifted(method: Any, chunks: list[Any]) -> None:
    """A rank's slice of the teacher's head begins one token too early."""
    signal = method.signals[0]
    rows = signal._head.weight_VD.roll(1, dims=0)
    signal._head = dataclasses.replace(signal._head, weight_VD=rows)


def _gate_left_out(method: Any, chunks: list[Any]) -> None:
    """Every token is distilled, whoever predicts its label better."""
    signal = method.signals[0]
    signal.flags = dataclasses.replace(signal.flags, kd_token_gate=False)


def _gate_of_the_next_token(method: Any, chunks: list[Any]) -> None:
    """A token is distilled where the teacher is better on another one."""
    right = distilled_cross_entropy._is_better
    wrong = mock.patch.object(
        distilled_cross_entropy, "_is_better", lambda *both: right(*both).roll(1)
    )
    for chunk in filter(lambda chunk: chunk.post_process, unwrap_model(chunks)):
        chunk.compute_language_model_loss = wrong(chunk.compute_language_model_loss)


def _seen_as(**changes: Callable[[Any], Any]) -> Fault:
    """A loss of all tokens together gets another target than the queue's."""

    def inject(method: Any, chunks: list[Any]) -> None:
        alignment = method.signals[0].alignment
        right = alignment._losses_SB

        def losses_SB(activation: torch.Tensor, resize: Any, target: Any) -> torch.Tensor:
            other = {name: change(target) for name, change in changes.items()}
            return right(activation, resize, dataclasses.replace(target, **other))

        alignment._losses_SB = losses_SB

    return inject


DISTILLATION_FAULTS: dict[str, Fault] = {
    "gate_left_out": _gate_left_out,
    "gate_of_the_next_token": _gate_of_the_next_token,
    "padding_kept": _padding_kept,
    "head_rows_shifted": _head_rows_shifted,
    "rows_of_another_rank": _rows_of_another_rank,
}
FAULTS: dict[str, Fault] = {
    "micro_batch_factor": _scaled(lambda: float(get_num_microbatches())),
    "tensor_parallel_factor": _scaled(lambda: 1 / mpu.get_tensor_model_parallel_world_size()),
    "context_parallel_factor": _scaled(lambda: 1 / mpu.get_context_parallel_world_size()),
    "tokens_of_the_whole_sequence": _tokens_of_the_whole_sequence,
    "contiguous_context_slices": _contiguous_context_slices,
    "mean_over_the_slice": _mean_over_the_slice,
    "unmarked_norm": _unmarked_norm,
    "counted_twice": _counted_twice,
    "newest_micro_batch": _newest_micro_batch,
    "per_micro_batch_mean": _per_micro_batch_mean,
    "unmarked_map": _unmarked_map,
    "index_without_virtual_stage": _index_without_virtual_stage,
    "no_loss_mask": _no_loss_mask,
    "view_from_the_last_layer": _view_from_the_last_layer,
    "rows_of_another_rank": _rows_of_another_rank,
    "documents_ignored": _documents_ignored,
    "statistics_of_the_slice": _seen_as(group=lambda _: SimpleNamespace(size=lambda: 1)),
    "statistics_of_masked_tokens": _seen_as(mask_SB=lambda t: torch.ones_like(t.mask_SB)),
}
