"""SALT (arXiv 2410.18779) and reverse KD: a small teacher's logits in the language-model loss.

`L = (1 - omega(s)) * L_NLL + omega(s) * CE(p_T, p_student)` on the tokens of the loss. SALT: during
the first steps, plain training after them. Reverse KD: during the whole run.

The teacher runs on the last pipeline stage, where the student's logits are. Each tensor-parallel
rank applies its own rows of the teacher's head; no logits are gathered.
"""

import functools
from argparse import Namespace
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.training import get_tokenizer

from megatron_let.data.selection import (
    SelectedFirst,
    load_selection,
    number_wanted,
)
from megatron_let.losses.attach import Record
from megatron_let.losses.distilled_cross_entropy import (
    Distillation,
    TeacherHead,
    distilled_cross_entropy,
)
from megatron_let.methods import signal
from megatron_let.methods.base import Batch
from megatron_let.methods.schedules import distillation_weight
from megatron_let.methods.signal import Signal
from megatron_let.teacher.load import TeacherConfig
from megatron_let.teacher.stage import Teacher

# Paths of Megatron that compute the loss elsewhere, or that were never run with a distilled one.
REFUSED_FLAGS = signal.REFUSED_FLAGS | {"context_parallel_size": (1,), "use_mup": (False,)}


class Distill(Signal):
    """Logit distillation until `--kd-stop-step`; without one (reverse KD) during the whole run."""

    same_on_resume = (
        "kd_weight",
        "kd_temperature",
        "kd_stop_step",
        "kd_decay",
        "kd_selection",
    )

    refused_flags = REFUSED_FLAGS
    danger = "the loss could be computed without the teacher."
    recorded = ("kd", "tokens")

    def __init__(self, args: Namespace, teacher: TeacherConfig) -> None:
        super().__init__(args, teacher)
        self._head: TeacherHead | None = None
        self._targets: deque[tuple[torch.Tensor, torch.Tensor]] = deque()
        """The teacher's states and the loss mask of each micro-batch that has not had its loss."""
        self._lm_losses: torch.Tensor | None = None
        self.record = Record()
        chosen = args.kd_selection
        self._selection = None if chosen is None else load_selection(Path(chosen))

    def weight_at(self, step: int, samples: int) -> float:
        """omega(s)."""
        args = self.args
        return distillation_weight(args.kd_weight, step, args.kd_stop_step, args.kd_decay)

    # --- before the run -----------------------------------------------------------------------

    def configure(self, model_config: Any) -> None:
        """Have the chunk with the output layer compute its loss here."""
        model_config.pre_wrap_hooks.append(self._install)

    def _install(self, chunks: list[Any]) -> list[Any]:
        for chunk in chunks:
            if chunk.post_process:
                self.owner_chunks.add(chunk.vp_stage)
                plain = chunk.compute_language_model_loss
                chunk.compute_language_model_loss = functools.partial(self._loss, chunk, plain)
        return chunks

    def prepare(self, teacher: Teacher) -> None:
        """Keep this rank's rows of the head."""
        size = self.args.padded_vocab_size // mpu.get_tensor_model_parallel_world_size()
        first = mpu.get_tensor_model_parallel_rank() * size
        known = min(self.teacher_config.vocab_size, get_tokenizer().vocab_size)
        weight, bias = teacher.head_rows(first, size)
        self._head = TeacherHead(weight, bias, min(max(known - first, 0), size), first)

    def training_data(self, dataset: Any) -> Any:
        """The stream with the selected samples in front."""
        if self._selection is None:
            return dataset
        self._selection.check(dataset.unique_description_hash)
        return SelectedFirst(dataset, self._selection.samples, number_wanted(self.args))

    def flops_once(self) -> float:
        """Those of scoring."""
        return 0.0 if self._selection is None else self._selection.flops

    def release(self) -> None:
        """Drop the head, which may be a part of the embedding."""
        self._head = None

    def flops_per_token(self) -> float:
        """The head's."""
        return self.teacher_config.head_flops_per_token

    # --- during the run -----------------------------------------------------------------------

    def start_step(self) -> None:
        """Forget what an interrupted step may have left."""
        self._targets.clear()
        self.record = Record()

    def push(self, batches: list[Batch], states_SBD: list[torch.Tensor]) -> None:
        """Queue the teacher's states for the loss."""
        masks = (batch["loss_mask"].float() for batch in batches)
        self._targets.extend(zip(states_SBD, masks, strict=True))

    def _loss(
        self,
        chunk: Any,
        plain: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        labels_BS: torch.Tensor,
        logits_SBV: torch.Tensor,
    ) -> torch.Tensor:
        """`GPTModel.compute_language_model_loss` `[B, S]`, distilled in a guided step."""
        self._lm_losses = None
        if not chunk.training or not self._targets:
            return plain(labels_BS, logits_SBV)
        states_SBD, mask_BS = self._targets.popleft()
        # As a control the same work is done on a copy, since Megatron's loss destroys the logits.
        given_SBV = logits_SBV.detach().clone() if self.is_control else logits_SBV
        assert self._head is not None
        losses = distilled_cross_entropy(
            given_SBV,
            labels_BS.transpose(0, 1),
            states_SBD,
            self._head,
            Distillation(weight=self.weight, temperature=self.args.kd_temperature),
            mpu.get_tensor_model_parallel_group(),
        )
        self.record.micro_batches += 1
        self.record.add(kd=(losses.kd.transpose(0, 1) * mask_BS).sum(), tokens=mask_BS.sum())
        if self.is_control:
            return plain(labels_BS, logits_SBV)
        self._lm_losses = losses.lm.transpose(0, 1)
        return losses.total.transpose(0, 1).contiguous()

    def language_model_losses(self) -> torch.Tensor | None:
        """The labels' cross-entropy of the micro-batch that has just had a distilled loss."""
        return self._lm_losses

    def report(self, sums: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The mean divergence and its weight."""
        kd, tokens = sums
        return {
            "kd loss": kd / tokens.clamp(min=1),
            "kd weight": torch.full_like(kd, 0.0 if self.is_control else self.weight),
        }

    # --- what it does -------------------------------------------------------------------------

    def summary(self) -> str:
        """Weight and its course."""
        args = self.args
        course = "during the whole run"
        if args.kd_stop_step is not None:
            course = f"{args.kd_decay} until step {args.kd_stop_step}"
        return f"distillation: weight {args.kd_weight} {course}, temperature {args.kd_temperature}"
