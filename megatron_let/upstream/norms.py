"""PyTorch's norms under sequence parallelism, for where Transformer Engine and Apex are missing."""

import copy
from collections.abc import Callable
from typing import Any

import torch

from megatron_let.upstream.table import Redirect


def _marking_weights(new: Any) -> Callable[..., torch.nn.Module]:
    """`WrappedTorchNorm.__new__` that marks its weights instead of refusing.

    Under sequence parallelism a norm sees a slice of the sequence, so its weights' gradients are
    partial sums; `finalize_model_grads` adds them over the TP group if the weights say so.
    """

    def build(cls: Any, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> Any:
        if not config.sequence_parallel:
            return new(cls, config, hidden_size, eps, **kwargs)
        unsharded = copy.copy(config)
        unsharded.sequence_parallel = False
        norm = new(cls, unsharded, hidden_size, eps, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    return build


REDIRECTS = [
    Redirect(
        "megatron.core.transformer.torch_norm.WrappedTorchNorm",
        "__new__",
        _marking_weights,
        "refuses sequence parallelism since it does not mark its weights",
    )
]
