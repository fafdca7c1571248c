"""A fake process group delivers little or nothing; here a lone rank gets what is like the truth.

What would be in the memory else is anything, NaN too, and how fast a GPU multiplies depends on it.
"""

from typing import Any

import torch
import torch.distributed as dist

SCALE = 0.02
"""Standard deviation of what the pipeline's neighbours "send": that of weights at the start."""


def fill_scattered() -> None:
    """Have the collectives that older torch's fake group leaves undone hand a rank its own part.

    Before Megatron's import, which keeps these functions by names of its own.
    """
    scatter, exchange = dist.reduce_scatter_tensor, dist.all_to_all_single

    def reduce_scatter_tensor(output: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        work = scatter(output, input, *args, **kwargs)
        group = kwargs.get("group") or dist.group.WORLD
        part = input.chunk(group.size())[group.rank()].view_as(output)
        if part.data_ptr() != output.data_ptr():
            output.copy_(part)
        return work

    def all_to_all_single(output: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        work = exchange(output, input, *args, **kwargs)
        output.copy_(input)
        return work

    dist.reduce_scatter_tensor, dist.all_to_all_single = reduce_scatter_tensor, all_to_all_single


def fill_received() -> None:
    """Have the pipeline's neighbours of a rank that is alone send noise."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    communicate = P2PCommunicator._communicate

    def filled(self: Any, **kwargs: Any) -> Any:
        *received, requests = communicate(self, **kwargs)
        with torch.no_grad():
            for tensor in received:
                if tensor is not None:
                    tensor.normal_(0.0, SCALE)
        return *received, requests

    P2PCommunicator._communicate = filled
