"""Late-to-Early Training (arXiv 2602.05393): a small frozen teacher guides an early layer.

`L = L_NLL + lambda(s) * mean over the loss's tokens of (1 - cos(h_student^(K), h_teacher^(last)))`

The teacher runs on the stage that owns layer K, K's `AlignedTransformerLayer` adds the gradient of
the second term to its output's, and nothing of ours travels between stages.
"""

import math
from argparse import Namespace
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import get_tokenizer

from megatron_let.alignment.attach import Alignment, Target
from megatron_let.alignment.layer import aligned_block_spec
from megatron_let.alignment.losses import LOSSES
from megatron_let.alignment.resize import ResizeConfig
from megatron_let.errors import UsageError
from megatron_let.methods.base import Method
from megatron_let.schedules import guidance_factor
from megatron_let.teacher.load import (
    DTYPES,
    TeacherConfig,
    check_token_ids,
    fingerprint,
    load_causal_lm,
    read_teacher_config,
    read_token_ids,
)
from megatron_let.teacher.stage import Teacher, near_random

# Paths of Megatron that bypass, capture or replace `TransformerLayer.forward`, or that show the
# student other document boundaries than the teacher. Each is refused until it is proven.
REFUSED_FLAGS: dict[str, tuple[Any, ...]] = {
    "overlap_moe_expert_parallel_comm": (False,),
    "cuda_graph_impl": ("none", None),
    "use_megatron_fsdp": (False,),
    "use_torch_fsdp2": (False,),
    "spec": (None,),
    "yaml_cfg": (None,),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "experimental_attention_variant": (None,),
    "reset_attention_mask": (False,),
    "reset_position_ids": (False,),
    "context_parallel_size": (1,),
}


class Let(Method):
    """Cosine alignment of student layer K with the teacher's last layer, early in the run."""

    same_on_resume = (
        "let_layer",
        "let_weight",
        "let_stop_step",
        "let_stop_samples",
        "let_decay",
        "let_loss",
        "let_resize",
        "let_resize_side",
    )

    def __init__(self, args: Namespace) -> None:
        super().__init__(args)
        _refuse_unproven(args)
        args.teacher_fingerprint = None  # saved in checkpoints
        self.config = _read_config(args)
        _check_context(self.config, args)
        self.teacher: Teacher | None = None
        self.weight = 0.0
        self.alignment = Alignment(LOSSES[args.let_loss])
        self.facts: dict[str, Any] = {}
        self._transformer: TransformerConfig
        self._owner_chunks: set[int | None] = set()

    # --- before the run -----------------------------------------------------------------------

    def check_tokens(self, student_ids: dict[str, int]) -> None:
        """Compare the two tokenizers; without one on either side, ids must at least exist."""
        teacher_ids = read_token_ids(self.config.name, self.config.revision)
        if student_ids and teacher_ids:
            check_token_ids(student_ids, teacher_ids, self.config.name)
        elif self.config.vocab_size < get_tokenizer().vocab_size:
            raise UsageError(
                f"--teacher-model {self.config.name} knows {self.config.vocab_size} token ids, "
                f"the student {get_tokenizer().vocab_size}: choose a teacher of the same tokenizer."
            )

    def check_checkpoint(self, saved: Namespace) -> None:
        """Only a run with a learned map saves one; the teacher must stay the same."""
        before = vars(saved)  # of any version, of Megatron-LM too
        if self.args.let_resize == "linear" and before.get("let_resize") != "linear":
            raise UsageError(
                f"The checkpoint in {self.args.load} holds no learned map, which --let-resize "
                "linear trains from the first step. Use --let-resize interpolate."
            )
        if not self.args.finetune:
            self.args.teacher_fingerprint = before.get("teacher_fingerprint")

    def configure(self, model_config: Any) -> None:
        """Replace layer K in the spec, and load the teacher before the model is wrapped."""
        self._transformer = model_config.transformer
        resize = ResizeConfig(
            kind=self.args.let_resize,
            side=self.args.let_resize_side,
            student_width=self._transformer.hidden_size,
            teacher_width=self.config.hidden_size,
        )

        def spec(config: Any, vp_stage: int | None = None) -> Any:
            block, owns = aligned_block_spec(
                config.transformer,
                vp_stage,
                layer_number=self.args.let_layer,
                alignment=self.alignment,
                resize=resize,
            )
            if owns:
                self._owner_chunks.add(vp_stage)
            return block

        model_config.transformer_layer_spec = spec

    def reads_batch(self, vp_stage: int | None) -> bool:
        """The chunk that owns layer K, as long as it is guided."""
        return vp_stage in self._owner_chunks

    def on_data(self, train_dataset: Any) -> None:
        """Load the teacher on its stage and score it on the run's first micro-batch.

        Reading a sample by its index consumes nothing of the data order.
        """
        guided = self._weight_at(self.args.iteration, self.args.consumed_train_samples) > 0
        if guided and self._owner_chunks:
            self._load()
            self._score(train_dataset)
            assert self.teacher is not None
            self.teacher.drop_head()
        self.facts = _share(self.facts)
        if self.facts:
            self._check_fingerprint()

    def _check_fingerprint(self) -> None:
        before, now = self.args.teacher_fingerprint, self.facts["fingerprint"]
        if before not in (None, now):
            raise UsageError(
                f"The teacher's weights have the fingerprint {now}, but {before} guided the run "
                f"that saved the checkpoint in {self.args.load}. Resume with that teacher, or "
                "start a new run from the checkpoint's weights: --finetune, with another --save."
            )
        self.args.teacher_fingerprint = now

    def _load(self) -> None:
        dtype = DTYPES.get(self.args.teacher_dtype, self._transformer.params_dtype)
        device = torch.device(torch.cuda.current_device())
        model = load_causal_lm(self.config, dtype, device)
        self.teacher = Teacher(model)
        self.facts = {
            "name": self.config.name,
            "parameters": self.teacher.parameters,
            "stage": mpu.get_pipeline_model_parallel_rank(),
            "fingerprint": fingerprint(model),
            "flops_per_token": self.teacher.forward_flops(1, self.args.seq_length),
        }

    def _score(self, train_dataset: Any) -> None:
        if train_dataset is None:  # only tensor-parallel rank 0 of a stage holds the data
            return
        samples = [train_dataset[i] for i in range(self.args.micro_batch_size)]
        device = torch.device(torch.cuda.current_device())
        tokens, labels, mask = (
            torch.stack([torch.as_tensor(sample[key]) for sample in samples]).to(device)
            for key in ("tokens", "labels", "loss_mask")
        )
        assert self.teacher is not None
        self.facts["lm_loss"] = self.teacher.lm_loss(tokens, labels, mask)

    # --- during the run -----------------------------------------------------------------------

    def start_step(self) -> None:
        """Fix the step's weight before Megatron moves its counters on."""
        self.weight = self._weight_at(self.args.curr_iteration, self.args.consumed_train_samples)
        self.alignment.start_step()

    def _weight_at(self, step: int, samples: int) -> float:
        args = self.args
        if args.let_stop_samples is not None:
            factor = guidance_factor(samples, args.let_stop_samples, args.let_decay)
        else:
            factor = guidance_factor(step, args.let_stop_step, args.let_decay)
        return args.let_weight * factor

    def before_forward(self, batch: dict[str, torch.Tensor]) -> None:
        """Queue the teacher's states of this micro-batch for layer K."""
        if self.weight == 0.0:
            return
        assert self.teacher is not None
        states_SBD = self.teacher.states_SBD(batch["tokens"])
        mask_SB = batch["loss_mask"].transpose(0, 1).float()
        self.alignment.push(
            Target(
                states_SBT=self._local(states_SBD),
                mask_SB=self._local(mask_SB),
                scale=self.weight * self._loss_scale(mask_SB.sum()),
            )
        )

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

    def _local(self, tensor_S: torch.Tensor) -> torch.Tensor:
        """This rank's slice of the sequence, under sequence parallelism."""
        if not self._transformer.sequence_parallel:
            return tensor_S
        size = mpu.get_tensor_model_parallel_world_size()
        return tensor_S.chunk(size)[mpu.get_tensor_model_parallel_rank()].contiguous()

    def end_step(self) -> dict[str, torch.Tensor]:
        """Sum the step's records over all ranks and release the teacher after the last use."""
        if self.weight == 0.0:
            self._release()
            return {}
        record = self.alignment.record
        self._check_every_micro_batch(record.micro_batches)
        names = ("loss", "tokens", "lm_gradient_square", "let_gradient_square")
        device = torch.cuda.current_device()
        sums = torch.stack(
            [record.sums.get(n, torch.zeros((), device=device)).float() for n in names]
        )
        torch.distributed.all_reduce(sums)
        loss, tokens, lm_square, let_square = sums
        cosine_loss = loss / tokens.clamp(min=1)
        return {
            "let loss": cosine_loss.view(1),
            "let weight": torch.full((1,), self.weight, device=device),
            "let gradient ratio": (let_square / lm_square.clamp(min=1e-30)).sqrt().view(1),
        }

    def _check_every_micro_batch(self, recorded: int) -> None:
        expected = get_num_microbatches() if self._owner_chunks else 0
        if recorded != expected:
            raise RuntimeError(
                f"Step {self.args.curr_iteration + 1}: layer {self.args.let_layer} recorded "
                f"{recorded} alignment losses for {expected} micro-batches. Some path of Megatron "
                "bypassed the layer; please report the flags of this run."
            )

    def _release(self) -> None:
        if self.teacher is not None:
            self.teacher = None
            torch.cuda.empty_cache()

    # --- what it costs and what it does -------------------------------------------------------

    def extra_flops(self, tokens: int) -> float:
        """The teacher's forward pass in a guided step."""
        return tokens * self.facts.get("flops_per_token", 0.0) if self.weight > 0 else 0.0

    def describe(self) -> dict[str, Any]:
        """Teacher and alignment, for the run's `metrics.jsonl`."""
        return {"teacher": self.facts or None}

    def summary(self) -> list[str]:
        """Teacher, layer and stage, weight, cost."""
        args = self.args
        if args.let_decay == "constant":
            course = "during the whole run"
        elif args.let_stop_samples is not None:
            course = f"{args.let_decay} until sample {args.let_stop_samples}"
        else:
            course = f"{args.let_decay} until step {args.let_stop_step}"
        layer = f"layer {args.let_layer} of {args.num_layers}"
        if not self.facts:
            return [f"LET: {layer}; the guidance is over, no teacher is loaded"]
        facts = self.facts
        stage = f"pipeline stage {facts['stage']} of {args.pipeline_model_parallel_size}"
        lines = [f"LET: {layer}, on {stage} (from 0), weight {args.let_weight} {course}"]
        loss = facts["lm_loss"]
        lines.append(
            f"teacher {facts['name']}: {facts['parameters'] / 1e6:.2f} M parameters, weights "
            f"{facts['fingerprint']}, loss {loss:.3f} on the first micro-batch"
        )
        if near_random(loss, self.config.vocab_size):
            lines.append(
                f"WARNING: a loss of {loss:.3f} is close to ln(vocabulary) = "
                f"{math.log(self.config.vocab_size):.3f}: the teacher {facts['name']} guesses. "
                "Was it trained, on such text, with this tokenizer?"
            )
        return lines


def _read_config(args: Namespace) -> TeacherConfig:
    try:
        return read_teacher_config(args.teacher_model, args.teacher_revision)
    except UsageError as error:
        if args.load is None:
            raise
        raise UsageError(
            f"{error} A run whose guidance is over goes on without a teacher: --method baseline."
        ) from error


def _refuse_unproven(args: Namespace) -> None:
    for name, allowed in REFUSED_FLAGS.items():
        value = getattr(args, name)
        if value not in allowed:
            shown = "" if value is True else f" {value}"
            raise UsageError(
                f"--{name.replace('_', '-')}{shown} is not supported with --method {args.method}: "
                "the aligned layer could be bypassed, or the teacher see another text than the "
                "student. Remove it, or use --method baseline."
            )


def _check_context(config: TeacherConfig, args: Namespace) -> None:
    if args.seq_length > config.context:
        raise UsageError(
            f"--seq-length {args.seq_length} is longer than the context of --teacher-model "
            f"{config.name} ({config.context} tokens). Use shorter sequences or another teacher."
        )


def _share(facts: dict[str, Any]) -> dict[str, Any]:
    """Merge the facts of all ranks: only the owner stage knows the teacher."""
    gathered: list[dict[str, Any] | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, facts)
    merged: dict[str, Any] = {}
    for part in gathered:
        merged |= part or {}
    return merged
