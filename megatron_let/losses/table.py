"""The alignment losses by name: `add_loss` adds one from outside the tree (docs/extending.md)."""

from collections.abc import Callable

import torch

from megatron_let.errors import UsageError
from megatron_let.losses.cosine import cosine

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of the student's states `[S, B, H]` and the teacher's, resized to `[S, B, H]`: `[S, B]`."""

LOSSES: dict[str, Loss] = {"cosine": cosine}


def add_loss(name: str, loss: Loss) -> None:
    """Add a loss for `--let-loss`, before the command line is parsed.

    Raises:
        UsageError: there is one of this name.
    """
    if name in LOSSES:
        raise UsageError(f"There is a loss {name} already: give yours another name.")
    LOSSES[name] = loss
