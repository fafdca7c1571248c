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
from typing import Any

import torch
from megatron.core import mpu
from megatron.training import get_tokenizer

from megatron_let.distillation.cross_entropy import (
    Distillation,
    TeacherHead,
    distilled_cross_entropy,
)
from megatron_let.errors import UsageError
from megatron_let.methods.with_teacher import Batch, TeacherMethod
from megatron_let.schedules import distillation_weight

# Paths of Megatron that compute the loss elsewhere, or that were never run with a distilled one.
REFUSED_FLAGS: dict[str, tuple[Any, ...]] = {
    "overlap_moe_expert_parallel_comm": (False,),
    "cuda_graph_impl": ("none", None),
    "use_megatron_fsdp": (False,),
    "use_torch_fsdp2": (False,),
    "mtp_num_layers": (None,),
    "context_parallel_size": (1,),
    "use_mup": (False,),
}


class Distill(TeacherMethod):
    """Logit distillation until `--kd-stop-step`; without one (reverse KD) during the whole run."""

    same_on_resume = (
        "kd_weight",
        "kd_temperature",
        "kd_temperature_side",
        "kd_stop_step",
        "kd_decay",
    )

    def __init__(self, args: Namespace) -> None:
        _refuse_unproven(args)
        super().__init__(args)
        self._head: TeacherHead
        self._targets: deque[tuple[torch.Tensor, torch.Tensor]] = deque()
        """The teacher's states and the loss mask of each micro-batch that has not had its loss."""
        self._lm_losses: torch.Tensor | None = None
        self._sums: torch.Tensor | None = None
        self._recorded = 0

    def weight_at(self, step: int, samples: int) -> float:
        """omega(s)."""
        args = self.args
        return distillation_weight(args.kd_weight, step, args.kd_stop_step, args.kd_decay)

    def slices_sequence(self) -> bool:
        """Logits are whole sequences on every rank, each with its slice of the vocabulary."""
        return False

    # --- before the run -----------------------------------------------------------------------

    def configure(self, model_config: Any) -> None:
        """Have the chunk with the output layer compute its loss here."""
        super().configure(model_config)
        model_config.pre_wrap_hooks.append(self._install)

    def _install(self, chunks: list[Any]) -> list[Any]:
        for chunk in chunks:
            if chunk.post_process:
                self._owner_chunks.add(chunk.vp_stage)
                plain = chunk.compute_language_model_loss
                chunk.compute_language_model_loss = functools.partial(self._loss, chunk, plain)
        return chunks

    def prepare_teacher(self) -> None:
        """Keep this rank's rows of the head beside the states."""
        assert self.teacher is not None
        ranks = mpu.get_tensor_model_parallel_world_size()
        size = self.args.padded_vocab_size // ranks
        first = mpu.get_tensor_model_parallel_rank() * size
        known = min(self.config.vocab_size, get_tokenizer().vocab_size)
        weight, bias = self.teacher.head_rows(first, size)
        num_tokens = min(max(known - first, 0), size)
        self._head = TeacherHead(weight, bias, num_tokens, first)
        self.facts["flops_per_token"] += 2.0 * self.teacher.width * self.config.vocab_size
        super().prepare_teacher()

    # --- during the run -----------------------------------------------------------------------

    def start_step(self) -> None:
        """Fix the step's weight; forget what an interrupted step may have left."""
        super().start_step()
        self._targets.clear()
        self._sums, self._recorded = None, 0

    def before_forward(self, batches: list[Batch]) -> None:
        """Queue the teacher's states of these micro-batches for their losses."""
        if self.weight > 0.0:
            masks = (batch["loss_mask"].float() for batch in batches)
            self._targets.extend(zip(self.teacher_states(batches), masks, strict=True))

    @property
    def num_waiting(self) -> int:
        """Micro-batches whose distilled loss is still to come."""
        return len(self._targets)

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
        what = Distillation(
            weight=self.weight,
            temperature=self.args.kd_temperature,
            both_sides=self.args.kd_temperature_side == "both",
        )
        losses = distilled_cross_entropy(
            logits_SBV,
            labels_BS.transpose(0, 1),
            states_SBD,
            self._head,
            what,
            mpu.get_tensor_model_parallel_group(),
        )
        self._lm_losses = losses.lm.transpose(0, 1)
        self._record((losses.kd.transpose(0, 1) * mask_BS).sum(), mask_BS.sum())
        return losses.total.transpose(0, 1).contiguous()

    def language_model_losses(self, losses_BS: torch.Tensor) -> torch.Tensor:
        """The labels' cross-entropy of the micro-batch that has just had its loss."""
        return losses_BS if self._lm_losses is None else self._lm_losses

    def _record(self, kd_sum: torch.Tensor, tokens: torch.Tensor) -> None:
        self._recorded += 1
        sums = torch.stack([kd_sum, tokens])
        self._sums = sums if self._sums is None else self._sums + sums

    def end_step(self) -> dict[str, torch.Tensor]:
        """Sum the step's records over all ranks and release the teacher after the last use."""
        super().end_step()
        if self.weight == 0.0:
            return {}
        zero = torch.zeros((), device=torch.cuda.current_device())
        self.check_every_micro_batch(self._recorded)
        own = zero.expand(2) if self._sums is None else self._sums
        owner = float(bool(self._owner_chunks))
        sums = torch.cat([own, torch.stack([zero + self.clock.read(), zero + owner])])
        torch.distributed.all_reduce(sums)
        kd, tokens, milliseconds, owners = sums.split(1)
        return {
            "kd loss": kd / tokens.clamp(min=1),
            "kd weight": torch.full_like(kd, self.weight),
            "teacher time (ms)": milliseconds / owners,
        }

    # --- what it does -------------------------------------------------------------------------

    def summary(self) -> list[str]:
        """Weight and its course, the teacher."""
        args = self.args
        course = "during the whole run"
        if args.kd_stop_step is not None:
            course = f"{args.kd_decay} until step {args.kd_stop_step}"
        return [
            f"distillation: weight {args.kd_weight} {course}, temperature {args.kd_temperature} "
            f"({args.kd_temperature_side}); the teacher runs on the last pipeline stage",
            *super().summary(),
        ]


def _refuse_unproven(args: Namespace) -> None:
    for name, allowed in REFUSED_FLAGS.items():
        value = getattr(args, name)
        if value not in allowed:
            shown = "" if value is True else f" {value}"
            raise UsageError(
                f"--{name.replace('_', '-')}{shown} is not supported with --method {args.method}: "
                "the loss could be computed without the teacher. Remove it, or use --method "
                "baseline."
            )
