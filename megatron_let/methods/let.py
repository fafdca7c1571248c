"""Late-to-Early Training (arXiv 2602.05393): a small teacher guides an early layer.

`L = L_NLL + lambda(s) * mean over the loss's tokens of (1 - cos(h_student^(K), h_teacher^(last)))`

The teacher runs on the stage that owns layer K, K's `AlignedTransformerLayer` adds the gradient of
the second term to its output's, and nothing of ours travels between stages.
"""

import functools
import math
from argparse import Namespace
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_let.errors import UsageError
from megatron_let.losses.attach import Alignment, Resize, Target
from megatron_let.losses.table import LOSSES, OF_ALL_TOKENS
from megatron_let.methods.balance import Balance
from megatron_let.methods.schedules import guidance_factor, run_length
from megatron_let.methods.signal import Signal
from megatron_let.methods.table import (
    LET_GRADIENT_RATIO,
    LET_LAYER,
    LET_STOP_STEP,
    Flags,
    method_row,
)
from megatron_let.methods.teacher_loss import TeacherLoss
from megatron_let.teacher.load import TeacherConfig
from megatron_let.teacher.stage import Teacher
from megatron_let.teacher.work import SCORED_EVERY
from megatron_let.upstream.aligned_layer import aligned_block_spec
from megatron_let.upstream.batch import TEACHER_INDEX, Batch

TOKENS_PER_FEATURE = 2
"""That a loss of all tokens together takes: with as many tokens as features all that is said can be
read off anything, with twice as many half of it."""


@dataclass(frozen=True)
class LetFlags(Flags):
    """Late-to-Early Training (arXiv 2602.05393); defaults are the paper's where it states one."""

    title = "LET"

    let_layer: int = LET_LAYER
    """Student layer to align, counted from 1. The paper says "an early layer"."""

    let_teacher_layer: int | None = None
    """Layer of the teacher to align it with, counted from 1; the default is its last, after its
    final norm. The layers behind another one are not run."""

    let_weight: float = 0.1
    """Weight of the alignment loss at the first step (the paper's best of 0.01 to 3.0)."""

    let_weight_rule: Literal["fixed", "ratio"] = "fixed"
    """ratio: the weight follows the gradients at the aligned layer, so that the alignment's is
    --let-gradient-ratio times the language model's; --let-weight is the first step's. The course
    until the stop is the same."""

    let_gradient_ratio: float = LET_GRADIENT_RATIO
    """What --let-weight-rule ratio aims at, at the first step."""

    let_stop_step: int | None = None
    """Step from which on the weight is zero and the teacher is released. Default 1500, or none
    with --let-decay constant."""

    let_decay: Literal["linear", "cosine", "step", "constant"] = "linear"
    """Course of the weight: linear or cosine to zero at the stop step, step: full weight until
    there, constant: full weight during the whole run."""

    let_loss: str = field(default="cosine", metadata={"argparse_meta": {"choices": LOSSES}})
    """How far the student's states are from the teacher's: cosine of each token, or cca, of all
    tokens of a micro-batch together, which asks for no width. --method-module may add a loss."""

    let_resize: Literal["interpolate", "linear"] = "interpolate"
    """How a teacher's states of another width are brought to the student's: interpolate along the
    features (no parameters), or linear, a learned map that is trained with the student, saved and
    resumed, never exported."""


class Let(Signal):
    """Cosine alignment of student layer K with the teacher's last layer, early in the run."""

    flag_group = LetFlags
    flags: LetFlags
    # Paths of Megatron that bypass, capture or copy the aligned layer, or were never run with it.
    # Each is refused until it is proven.
    refused_flags = Signal.refused_flags | {
        "spec": (None,),
        "yaml_cfg": (None,),
        "heterogeneous_layers_config_path": (None,),
        "heterogeneous_layers_config_encoded_json": (None,),
        "experimental_attention_variant": (None,),
    }
    danger = "the aligned layer could be bypassed or copied, and nothing would tell."
    logged = ("let loss", "let weight")
    needs_same_tokens = False
    measure = "cosine"
    recorded = (
        "loss",
        "tokens",
        "all_tokens",
        "lm_gradient_square",
        "let_gradient_square",
        "gradient_product",
        "teacher",
        "scored",
    )

    def __init__(self, args: Namespace, teacher: TeacherConfig) -> None:
        if args.let_teacher_layer is None:
            args.let_teacher_layer = teacher.num_layers
        if not 1 <= args.let_teacher_layer <= teacher.num_layers:
            raise UsageError(
                f"--let-teacher-layer {args.let_teacher_layer} is outside --teacher-model "
                f"{teacher.name}, which has layers 1 to {teacher.num_layers}. Leave it out."
            )
        super().__init__(args, teacher)
        loss = LOSSES[self.flags.let_loss]
        self.queue = self.alignment = Alignment(loss)
        self._is_of_all_tokens = loss in OF_ALL_TOKENS
        if self._is_of_all_tokens:
            self._check_tokens_of_a_micro_batch()
        self._transformer: TransformerConfig
        self._teacher_loss: TeacherLoss | None = None
        if args.guidance_stop == "loss" and not method_row(args.method).distils:
            self._follow_loss()
        self._balance: Balance | None = None
        if self.flags.let_weight_rule == "ratio":
            self._balance = Balance(self.flags.let_gradient_ratio, self.flags.let_weight)

    @classmethod
    def check_flags(cls, args: Namespace) -> None:
        """Layer, weight and stop; a default stop is filled in."""
        ratio = args.let_gradient_ratio
        if not (ratio > 0 and math.isfinite(ratio)):
            raise UsageError(
                f"--let-gradient-ratio {ratio} cannot guide the student; use a positive ratio, "
                f"such as {LET_GRADIENT_RATIO}."
            )
        if ratio != LET_GRADIENT_RATIO and args.let_weight_rule != "ratio":
            raise UsageError(
                f"--let-gradient-ratio {ratio} has no effect without --let-weight-rule ratio."
            )
        if args.num_layers is not None and not 1 <= args.let_layer <= args.num_layers:
            raise UsageError(
                f"--let-layer {args.let_layer} is outside the model: --num-layers "
                f"{args.num_layers} allows 1 to {args.num_layers}."
            )
        if not (args.let_weight > 0 and math.isfinite(args.let_weight)):
            raise UsageError(
                f"--let-weight {args.let_weight} cannot guide the student; use a positive weight "
                "(the paper's is 0.1), or --method baseline."
            )
        _resolve_stop(args)

    def _check_tokens_of_a_micro_batch(self) -> None:
        args, name = self.args, f"--let-loss {self.flags.let_loss}"
        if self.flags.let_resize != "interpolate":
            raise UsageError(
                f"--let-resize {self.flags.let_resize} has no effect with {name}, which compares "
                "states of any widths. Leave it out."
            )
        tokens = args.micro_batch_size * args.seq_length
        width = max(args.hidden_size, self.teacher_config.width(self.teacher_layer()))
        if tokens < TOKENS_PER_FEATURE * width:
            raise UsageError(
                f"{name} finds a likeness in anything if a micro-batch has few tokens: "
                f"--micro-batch-size {args.micro_batch_size} x --seq-length {args.seq_length} are "
                f"{tokens} for {width} features, and it takes {TOKENS_PER_FEATURE} each. Use a "
                "larger micro-batch, or --let-loss cosine."
            )

    def _follow_loss(self) -> None:
        """Distillation has the teacher's loss at hand; here its head is kept for it."""
        if self.teacher_layer() is not None:
            raise UsageError(
                f"--guidance-stop loss needs the teacher's last layer, and --let-teacher-layer "
                f"{self.flags.let_teacher_layer} leaves out what is behind. Remove one of the two."
            )
        self.measure, self.measured_every = "loss", SCORED_EVERY
        self._teacher_loss = TeacherLoss(self.teacher_config)

    def weight_at(self, step: int) -> float:
        """lambda(s)."""
        flags = self.flags
        return flags.let_weight * guidance_factor(step, flags.let_stop_step, flags.let_decay)

    def _lambda(self, device: torch.device) -> torch.Tensor:
        """The current step's weight by the rule, a scalar."""
        assert self._balance is not None
        return self._balance.weight(device) * (self.weight / self.flags.let_weight)

    def on_load(self, state: dict[str, Any]) -> None:
        """The averages behind a weight that sets itself."""
        if self._balance is not None:
            self._balance.load(state)

    def state(self) -> dict[str, Any]:
        """Those."""
        return {} if self._balance is None else self._balance.state()

    def teacher_layer(self) -> int | None:
        """None for the last layer, whose states are those after the final norm."""
        layer = self.flags.let_teacher_layer
        return None if layer == self.teacher_config.num_layers else layer

    # --- before the run -----------------------------------------------------------------------

    def check_checkpoint(self, saved: Namespace) -> None:
        """Only a run with a learned map saves one."""
        before = vars(saved)  # of any version, of Megatron-LM too
        if self.flags.let_resize == "linear" and before.get("let_resize") != "linear":
            raise UsageError(
                f"The checkpoint in {self.args.load} holds no learned map, which --let-resize "
                "linear trains from the first step. Use --let-resize interpolate."
            )

    def configure(self, model_config: Any) -> None:
        """Replace layer K in the spec."""
        self._transformer = model_config.transformer
        widths = self._transformer.hidden_size, self.teacher_config.width(self.teacher_layer())
        resize = functools.partial(Resize, self.flags.let_resize, *widths)

        def spec(config: Any, vp_stage: int | None = None) -> Any:
            layer = self.flags.let_layer
            block, owns = aligned_block_spec(config, vp_stage, layer, self.alignment, resize)
            if owns:
                self.owner_chunks.add(vp_stage)
            return block

        model_config.transformer_layer_spec = spec

    def prepare(self, teacher: Teacher) -> None:
        """Keep its head where its loss is followed."""
        if self._teacher_loss is not None:
            self._teacher_loss.prepare(teacher)

    def release(self) -> None:
        """Drop that."""
        if self._teacher_loss is not None:
            self._teacher_loss.release()

    def flops_per_token(self) -> float:
        """Of the products of all features, in both passes, and of the teacher's head."""
        width = self._transformer.hidden_size + self.teacher_config.width(self.teacher_layer())
        products = 6.0 * width**2 if self._is_of_all_tokens else 0.0
        head = self.teacher_config.head_flops_per_token / SCORED_EVERY
        return products + head * (self._teacher_loss is not None)

    # --- during the run -----------------------------------------------------------------------

    def slices_sequence(self) -> bool:
        """Layer K's output is sliced under sequence parallelism."""
        return self._transformer.sequence_parallel

    def push(self, batches: list[Batch], states_SBD: list[torch.Tensor]) -> None:
        """Queue the teacher's states for layer K, and what their loss is multiplied by."""
        weight = self._lambda(states_SBD[0].device) if self._balance else self.weight
        group = mpu.get_context_parallel_group()
        if self.slices_sequence():
            group = mpu.get_tensor_and_context_parallel_group()
        for batch, states_SBT in zip(batches, states_SBD, strict=True):
            mask_SB = batch["loss_mask"].transpose(0, 1).float()
            scale = weight * self._loss_scale(mask_SB.sum())
            mask_SB = self._own_part(mask_SB)
            if len(states_SBT) > len(mask_SB):  # another signal wants the whole sequence
                states_SBT = self._own_part(states_SBT)
            self._score(batch, states_SBT, mask_SB)
            if self.is_translated:  # the tokens with a target weigh what they would among others
                self.alignment.add(all_tokens=mask_SB.sum())
                has_target_SB = (batch[TEACHER_INDEX] >= 0).transpose(0, 1).float()
                mask_SB = mask_SB * self._own_part(has_target_SB)
            target = Target(states_SBT, mask_SB, None if self.is_control else scale, group)
            self.alignment.push(target)

    def _score(self, batch: Batch, states_SBT: torch.Tensor, mask_SB: torch.Tensor) -> None:
        if self._teacher_loss is None or not self._teacher_loss.is_due(self.args.curr_iteration):
            return
        labels_SB = self._own_part(batch["labels"].transpose(0, 1))
        self.alignment.add(**self._teacher_loss.sums(states_SBT, labels_SB, mask_SB))

    def _own_part(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's slice of a sequence `[S, ...]`, where it has but one."""
        return scatter_to_sequence_parallel_region(whole) if self.slices_sequence() else whole

    def _loss_scale(self, num_tokens: torch.Tensor) -> torch.Tensor:
        """The factor that Megatron puts on the language-model loss's sum over tokens.

        `schedules.forward_step` divides by tokens and micro-batches, unless the loss is per token:
        then `finalize_model_grads` divides by all tokens of the step. `backward_step` multiplies by
        the gradient scaler's factor.
        """
        scale = torch.ones(1, device=num_tokens.device)
        if self._transformer.grad_scale_func is not None:
            scale = self._transformer.grad_scale_func(scale)
        if self._transformer.calculate_per_token_loss:
            return scale
        return scale / (num_tokens.clamp(min=1) * get_num_microbatches())

    def report(self, loss: torch.Tensor, tokens: torch.Tensor, *squares: Any) -> dict[str, Any]:
        """How the gradients compare, too, and which share of the tokens had a target."""
        all_tokens, lm_square, let_square, product, teacher, scored = squares
        report = super().report(loss, tokens)
        if not self.is_control:  # which adds no gradient
            report["let gradient ratio"] = (let_square / lm_square.clamp(min=1e-30)).sqrt()
            report["let gradient cosine"] = _cosine(lm_square, let_square, product)
        if self._balance is not None and not self.is_control:
            report["let weight"] = self._lambda(loss.device).view(1)
        if self.is_translated:
            report["let guided share"] = tokens / all_tokens.clamp(min=1)
        if self._teacher_loss is not None and self._teacher_loss.is_due(self.args.curr_iteration):
            report["teacher loss"] = teacher / scored.clamp(min=1)
        return report

    def measured(self, student_loss: torch.Tensor, *totals: torch.Tensor) -> torch.Tensor:
        """The cosine between the two gradients at layer K, or how far the teacher is ahead."""
        *_, lm_square, let_square, product, teacher, scored = totals
        if self._teacher_loss is not None:
            return student_loss - teacher / scored  # NaN in steps that are not scored: no measure
        return _cosine(lm_square, let_square, product)

    def learn(self, *totals: torch.Tensor) -> None:
        """The gradients of a step decide about the next one's weight."""
        if self._balance is not None:
            squares = dict(zip(self.recorded, totals, strict=True))
            weight = self._lambda(totals[0].device)
            let_square = squares["let_gradient_square"] / weight.square()
            self._balance.update(squares["lm_gradient_square"], let_square)

    # --- what it does -------------------------------------------------------------------------

    def summary(self) -> str:
        """Layers, weight and its course."""
        flags, course = self.flags, "during the whole run"
        if flags.let_stop_step is not None:
            course = f"{flags.let_decay} until step {flags.let_stop_step}"
        weight = f"weight {flags.let_weight}"
        if self._balance is not None:
            weight += f", then by the gradients ({flags.let_gradient_ratio} of the LM loss's),"
        loss = "" if flags.let_loss == "cosine" else f"{flags.let_loss}, "
        if self._teacher_loss is not None:
            course += f", the teacher scored every {SCORED_EVERY} steps"
        return (
            f"LET: layer {flags.let_layer} of {self.args.num_layers} with the teacher's layer "
            f"{flags.let_teacher_layer} of {self.teacher_config.num_layers}, {loss}{weight} "
            f"{course}"
        )


def _cosine(
    lm_square: torch.Tensor, let_square: torch.Tensor, product: torch.Tensor
) -> torch.Tensor:
    return product / lm_square.sqrt() / let_square.sqrt()  # NaN without gradients: no measure


def _resolve_stop(args: Namespace) -> None:
    given = args.let_stop_step
    if args.let_decay == "constant":
        if given is not None:
            raise UsageError(
                "--let-decay constant guides the whole run, so a stop has no effect. Remove "
                "--let-stop-step, or use --let-decay step to stop there."
            )
        return
    stop = args.let_stop_step = LET_STOP_STEP if given is None else given
    total = run_length(args)
    if stop < 1:
        raise UsageError(f"--let-stop-step {stop} must be at least 1.")
    if total is not None and stop > total:
        raise UsageError(
            f"The guidance would end after the run: --let-stop-step "
            f"{stop}{' (the default)' if given is None else ''} is beyond the run's {total}. "
            f"Choose a stop of at most {total}, or --let-decay constant for the whole run."
        )
