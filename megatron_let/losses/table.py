"""The alignment losses by name: `add_loss` adds one from outside the tree (docs/extending.md)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from megatron_let.errors import UsageError
from megatron_let.losses.canonical import cca

Loss = Callable[..., torch.Tensor]
"""Of the student's states `[S, B, H]` and the teacher's, resized to `[S, B, H]`: `[S, B]`."""


def cosine(student_SBH: torch.Tensor, teacher_SBH: torch.Tensor) -> torch.Tensor:
    """`1 - cos(student, teacher)` of every token, `[S, B]`, in float32 (LET, section 2.1).

    The paper minimises `-cos`; one more makes the loss non-negative and leaves the gradient as it
    is. Norms and dot product are float32 whatever the inputs are: half precision would round the
    small differences between nearly parallel vectors away.
    """
    return 1.0 - F.cosine_similarity(student_SBH.float(), teacher_SBH.float(), dim=-1)


LOSSES: dict[str, Loss] = {"cosine": cosine, "cca": cca}
OF_ALL_TOKENS = {cca}
"""Losses of a micro-batch's tokens together: given the teacher's states as they are, `[S, B, T]`,
the mask `[S, B]` and the group of the ranks which hold the micro-batch, too."""


def add_loss(name: str, loss: Loss) -> None:
    """Add a loss for `--let-loss`, before the command line is parsed; UsageError if it is known."""
    if name in LOSSES:
        raise UsageError(f"There is a loss {name} already: give yours another name.")
    LOSSES[name] = loss
