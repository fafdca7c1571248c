"""Attention under context parallelism without Transformer Engine: every rank gathers all keys.

Exact, and as slow as that sounds. Megatron's local attention knows no context parallelism, so the
gradient contract runs with this one on CPU; everything else of context parallelism is Megatron's.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.models import backends


class _Gather(torch.autograd.Function):
    """All ranks' tensors one behind the other."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        parts = [torch.empty_like(own) for _ in range(group.size())]
        torch.distributed.all_gather(parts, own, group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = upstream.contiguous()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total.chunk(ctx.group.size())[ctx.group.rank()], None


class GatheredAttention(torch.nn.Module):
    """Causal attention of this rank's queries over the whole sequence's keys."""

    def __init__(self, config: Any, *_: Any, **__: Any) -> None:
        super().__init__()
        self.scale = config.kv_channels**-0.5

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        """`[own s, b, heads, d]` each, fewer heads of keys and values; returns `[own s, b, h]`."""
        group = mpu.get_context_parallel_group()
        size, rank = group.size(), group.rank()
        chunks = torch.arange(query.size(0) * size).chunk(2 * size)
        parts = [torch.cat([chunks[i], chunks[-1 - i]]) for i in range(size)]
        keys, values = (
            _Gather.apply(x.contiguous(), group).repeat_interleave(query.size(2) // x.size(2), 2)
            for x in (key, value)
        )
        scores = torch.einsum("qbhd,kbhd->bhqk", query, keys) * self.scale
        forbidden = parts[rank][:, None] < torch.cat(parts)[None, :]
        weights = scores.masked_fill(forbidden, float("-inf")).softmax(-1)
        return torch.einsum("bhqk,kbhd->qbhd", weights, values).flatten(2)


@contextlib.contextmanager
def context_parallel_attention(wanted: bool) -> Iterator[None]:
    """Build layers with it, where it is wanted."""
    right = backends.DotProductAttention
    if wanted:
        backends.DotProductAttention = GatheredAttention
    try:
        yield
    finally:
        backends.DotProductAttention = right
