"""SALT (arXiv 2410.18779) and reverse KD: a small teacher's logits in the language-model loss.

`L = (1 - omega(s)) * L_NLL + omega(s) * CE(p_T, p_student)` on the tokens of the loss. SALT: during
the first steps, plain training after them. Reverse KD: during the whole run.

The teacher runs on the last pipeline stage, where the student's logits are. Each tensor-parallel
rank applies its own rows of the teacher's head; no logits are gathered.
"""

import functools
import math
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import mpu
from megatron.training import get_tokenizer

from megatron_let.data.selection import SelectedFirst, load_selection, number_wanted
from megatron_let.errors import UsageError
from megatron_let.losses.distilled_cross_entropy import TeacherHead, distilled_cross_entropy
from megatron_let.methods.schedules import guidance_factor, run_length
from megatron_let.methods.signal import Signal
from megatron_let.methods.table import KD_STOP_SHARE, Flags, method_row
from megatron_let.teacher.load import TeacherConfig
from megatron_let.teacher.stage import Teacher
from megatron_let.teacher.work import logits_at_once
from megatron_let.upstream.batch import Batch


@dataclass(frozen=True)
class DistillFlags(Flags):
    """SALT (arXiv 2410.18779) and reverse KD; neither weight nor temperature is known for sure."""

    title = "distillation"

    kd_weight: float = 0.667
    """Part of the distillation in the loss, 0 to 1; the rest is the language-model loss. For a
    teacher much smaller than the student try 0.2 to 0.5."""

    kd_temperature: float = 1.0
    """What the teacher's logits are divided by."""

    kd_stop_step: int | None = None
    """SALT's step from which on training is plain and the teacher released; the default is 17.3
    percent of the run's steps."""

    kd_decay: Literal["step", "linear"] = "step"
    """SALT's course of the weight until there: full weight, or linear to zero."""

    kd_token_gate: bool = field(
        default=False, metadata={"argparse_meta": {"action": BooleanOptionalAction}}
    )
    """Distil only the tokens whose label the teacher predicts better than the student does."""

    kd_selection: str | None = None
    """SALT_DS: file of megatron-let select with the samples to see until the stop step."""


class Distill(Signal):
    """Logit distillation until `--kd-stop-step`; without one (reverse KD) during the whole run."""

    flag_group = DistillFlags
    flags: DistillFlags
    # Paths of Megatron that compute the loss elsewhere, or were never run with a distilled one.
    refused_flags = Signal.refused_flags | {"context_parallel_size": (1,), "use_mup": (False,)}
    danger = "the loss could be computed without the teacher."
    logged = ("kd loss", "kd weight")
    recorded = ("loss", "tokens", "teacher", "better")
    measure = "loss"

    def __init__(self, args: Namespace, teacher: TeacherConfig) -> None:
        super().__init__(args, teacher)
        self._head: TeacherHead | None = None
        self._lm_losses: torch.Tensor | None = None
        chosen = self.flags.kd_selection
        self._selection = None if chosen is None else load_selection(Path(chosen))
        args.kd_selected = self._selection and self._selection.digest  # saved in checkpoints

    @classmethod
    def check_flags(cls, args: Namespace) -> None:
        """Weight, temperature and stop; a default stop is filled in."""
        if not 0 < args.kd_weight <= 1:
            raise UsageError(
                f"--kd-weight {args.kd_weight} is no part of a loss: choose more than 0 and at "
                "most 1, or --method baseline."
            )
        if not (args.kd_temperature > 0 and math.isfinite(args.kd_temperature)):
            raise UsageError(f"--kd-temperature {args.kd_temperature} must be positive.")
        if args.kd_token_gate and args.kd_temperature != 1:
            raise UsageError(
                f"--kd-token-gate compares losses at a temperature of 1, not --kd-temperature "
                f"{args.kd_temperature}. Remove one of the two."
            )
        if not method_row(args.method).distils_to_the_end:
            _check_salt_stop(args)
        elif (args.kd_stop_step, args.kd_decay, args.kd_selection) != (None, "step", None):
            raise UsageError(
                "--kd-stop-step, --kd-decay and --kd-selection have no effect with --method "
                "reverse-kd, which distils during the whole run. Remove them, or use --method salt."
            )

    @property
    def same_on_resume(self) -> tuple[str, ...]:
        """A selection is known by its samples, wherever it lies."""
        return tuple(n.replace("kd_selection", "kd_selected") for n in super().same_on_resume)

    def weight_at(self, step: int) -> float:
        """omega(s)."""
        flags = self.flags
        return flags.kd_weight * guidance_factor(step, flags.kd_stop_step, flags.kd_decay)

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
        number, temperature = min(max(known - first, 0), size), self.flags.kd_temperature
        self._head = TeacherHead(weight, bias, number, first, temperature)

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

    def push(self, batches: list[Batch], states_SBD: list[torch.Tensor]) -> None:
        """Queue the teacher's states for the loss, and the loss mask."""
        for batch, states in zip(batches, states_SBD, strict=True):
            self.queue.push((states, batch["loss_mask"].float()))

    def _loss(
        self,
        chunk: Any,
        plain: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        labels_BS: torch.Tensor,
        logits_SBV: torch.Tensor,
    ) -> torch.Tensor:
        """`GPTModel.compute_language_model_loss` `[B, S]`, distilled in a guided step."""
        self._lm_losses = None
        if not chunk.training or not self.queue:
            return plain(labels_BS, logits_SBV)
        states_SBD, mask_BS = self.queue.targets.popleft()
        # As a control the same work is done on a copy, since Megatron's loss destroys the logits.
        given_SBV = logits_SBV.detach().clone() if self.is_control else logits_SBV
        assert self._head is not None
        losses = distilled_cross_entropy(
            given_SBV,
            labels_BS.transpose(0, 1),
            states_SBD,
            self._head,
            self.weight,
            mpu.get_tensor_model_parallel_group(),
            logits_at_once(labels_BS.numel()),
            self.flags.kd_token_gate,
        )
        self.queue.micro_batches += 1
        recorded = losses.kd, losses.teacher, losses.is_better
        for name, each_SB in zip(("loss", "teacher", "better"), recorded, strict=True):
            counted_BS = each_SB.transpose(0, 1).where(mask_BS > 0, 0.0)  # others may be infinite
            self.queue.add(**{name: counted_BS.sum()})
        self.queue.add(tokens=mask_BS.sum())
        if self.is_control:
            return plain(labels_BS, logits_SBV)
        self._lm_losses = losses.lm.transpose(0, 1)
        return losses.total.transpose(0, 1).contiguous()

    def report(self, loss: torch.Tensor, tokens: torch.Tensor, *own: Any) -> dict[str, Any]:
        """The teacher's own loss on the same tokens, too, and the share on which it is better."""
        report = super().report(loss, tokens)
        if self.flags.kd_temperature == 1:  # at another they are others
            for name, total in zip(("teacher loss", "teacher better share"), own, strict=True):
                report[name] = total / tokens.clamp(min=1)
        return report

    def measured(self, student_loss: torch.Tensor, *totals: torch.Tensor) -> torch.Tensor:
        """How far the student's loss is above the teacher's, nats a token."""
        _, tokens, teacher, _ = totals
        return student_loss - teacher / tokens

    def language_model_losses(self) -> torch.Tensor | None:
        """The labels' cross-entropy of the micro-batch that has just had a distilled loss."""
        return self._lm_losses

    # --- what it does -------------------------------------------------------------------------

    def summary(self) -> str:
        """Weight and its course."""
        flags, course = self.flags, "during the whole run"
        if flags.kd_stop_step is not None:
            course = f"{flags.kd_decay} until step {flags.kd_stop_step}"
        if flags.kd_token_gate:
            course += ", on the tokens that the teacher predicts better"
        temperature = flags.kd_temperature
        return f"distillation: weight {flags.kd_weight} {course}, temperature {temperature}"


def _check_salt_stop(args: Namespace) -> None:
    steps = run_length(args)
    if args.kd_stop_step is None and steps is not None:
        args.kd_stop_step = max(1, round(KD_STOP_SHARE * steps))
    stop = args.kd_stop_step
    if stop is None and args.step_batch_size_schedule is not None:
        raise UsageError(
            "--method salt needs --kd-stop-step where --step-batch-size-schedule is given."
        )
    if stop is not None and not 1 <= stop <= (steps or stop):
        raise UsageError(
            f"--kd-stop-step {stop} is outside the run: choose 1 to {steps}, or --method "
            "reverse-kd to distil during the whole run."
        )
    if args.kd_selection is not None and args.dataloader_type not in (None, "single"):
        raise UsageError(
            f"--kd-selection has no effect with --dataloader-type {args.dataloader_type}, which "
            "draws its own order. Use --dataloader-type single."
        )
