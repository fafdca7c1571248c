"""The teacher's own loss, where nothing but its states is wanted: `--guidance-stop loss` in LET."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.training import get_tokenizer

from megatron_let.teacher.load import TeacherConfig
from megatron_let.teacher.stage import Teacher
from megatron_let.teacher.work import SCORED_EVERY, logits_at_once


class TeacherLoss:
    """Scores the teacher on the tokens of every `SCORED_EVERY`th step.

    Each rank applies the whole head to the tokens that it has: its slice of the sequence, or what
    other tensor-parallel ranks have as well; both are sums over as many tokens.
    """

    def __init__(self, config: TeacherConfig) -> None:
        self._config = config
        self._head: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def prepare(self, teacher: Teacher) -> None:
        """Keep the head's rows that have a token."""
        rows = min(self._config.vocab_size, get_tokenizer().vocab_size)
        self._head = teacher.head_rows(0, rows)

    def release(self) -> None:
        """Drop them."""
        self._head = None

    @staticmethod
    def is_due(step: int) -> bool:
        """Whether the step after `step` steps is scored."""
        return step % SCORED_EVERY == 0

    @torch.no_grad()
    def sums(
        self, states_SBD: torch.Tensor, labels_SB: torch.Tensor, mask_SB: torch.Tensor
    ) -> dict[str, Any]:
        """The summed loss of the labels in nats, and the number of the mask's tokens."""
        assert self._head is not None
        inputs = states_SBD.flatten(0, 1), labels_SB.flatten()
        at_once = logits_at_once(labels_SB.numel())
        parts = zip(*(every.split(at_once) for every in inputs), strict=True)
        losses = [
            F.cross_entropy(F.linear(states, *self._head).float(), labels, reduction="none")
            for states, labels in parts
        ]
        total = torch.cat(losses).where(mask_SB.flatten() > 0, 0.0).sum()
        return {"teacher": total, "scored": mask_SB.sum()}
