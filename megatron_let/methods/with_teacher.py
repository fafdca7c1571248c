"""What methods with a teacher share: its life on its pipeline stage, from loading to release."""

import math
from argparse import Namespace
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import get_tokenizer

from megatron_let.errors import UsageError
from megatron_let.methods.base import Method
from megatron_let.planning.teacher_work import micro_batches_at_once
from megatron_let.teacher.clock import Clock
from megatron_let.teacher.load import (
    DTYPES,
    TeacherConfig,
    check_token_ids,
    fingerprint,
    load_causal_lm,
    read_teacher_config,
    read_token_ids,
)
from megatron_let.teacher.split import states_SBD
from megatron_let.teacher.stage import Rows, Teacher, near_random

Batch = dict[str, torch.Tensor]


class TeacherMethod(Method):
    """A frozen teacher runs on one chunk of the pipeline while its guidance lasts."""

    def __init__(self, args: Namespace) -> None:
        super().__init__(args)
        args.teacher_fingerprint = None  # saved in checkpoints
        self.config = _read_config(args)
        self.teacher: Teacher | None = None
        self.clock = Clock()
        self.weight = 0.0
        """Of the teacher in the current step; 0 once the guidance is over."""
        self.facts: dict[str, Any] = {}
        """About the teacher, the same on all ranks; empty if none was loaded."""
        self._transformer: TransformerConfig
        self._owner_chunks: set[int | None] = set()
        """Virtual stages of this rank that need the teacher."""
        _check_rows(self.config, args)

    def weight_at(self, step: int, samples: int) -> float:
        """The teacher's weight after `step` steps and `samples` samples."""
        raise NotImplementedError

    def teacher_layer(self) -> int | None:
        """The teacher's layer whose states are wanted; None for its last."""
        return None

    def slices_sequence(self) -> bool:
        """Whether a tensor-parallel rank needs its slice of the sequence only."""
        return self._transformer.sequence_parallel

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
        """Remember whose guidance the checkpoint has; `on_data` compares."""
        if not self.args.finetune:
            self.args.teacher_fingerprint = vars(saved).get("teacher_fingerprint")

    def configure(self, model_config: Any) -> None:
        """Remember Megatron's `TransformerConfig`."""
        self._transformer = model_config.transformer

    def reads_batch(self, vp_stage: int | None) -> bool:
        """The chunk that needs the teacher."""
        return vp_stage in self._owner_chunks

    def on_data(self, train_dataset: Any) -> None:
        """Load the teacher on its stage and score it on the run's first micro-batch.

        Reading a sample by its index consumes nothing of the data order.
        """
        guided = self.weight_at(self.args.iteration, self.args.consumed_train_samples) > 0
        if guided and self._owner_chunks:
            self.load()
            self._score(train_dataset)
            self.prepare_teacher()
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

    def load(self) -> None:
        """Load the teacher on this rank."""
        dtype = DTYPES.get(self.args.teacher_dtype, self._transformer.params_dtype)
        device = torch.device(torch.cuda.current_device())
        model = load_causal_lm(self.config, dtype, device)
        length = self.args.seq_length
        self.teacher = Teacher(model, self.config.context, self.teacher_layer())
        self.facts = {
            "name": self.config.name,
            "parameters": self.teacher.parameters,
            "stage": mpu.get_pipeline_model_parallel_rank(),
            "fingerprint": fingerprint(model),
            "flops_per_token": self.teacher.forward_flops(length, length) / length,
        }

    def prepare_teacher(self) -> None:
        """Drop what the run does not need of a teacher that has been loaded and scored."""
        assert self.teacher is not None
        self.teacher.keep_states_only()

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
        self.facts["lm_loss"] = self.teacher.lm_loss({"tokens": tokens}, labels, mask)

    # --- during the run -----------------------------------------------------------------------

    def start_step(self) -> None:
        """Fix the step's weight before Megatron moves its counters on."""
        self.weight = self.weight_at(self.args.curr_iteration, self.args.consumed_train_samples)

    def micro_batches_at_once(self) -> int:
        """So many that their rows can be dealt evenly over the tensor-parallel ranks."""
        if self.weight == 0.0:
            return 1
        ranks = mpu.get_tensor_model_parallel_world_size()
        return micro_batches_at_once(self.args.micro_batch_size, ranks)

    def teacher_states(self, batches: list[Batch]) -> list[torch.Tensor]:
        """The teacher's states `[S, b, D]` for each of some micro-batches, this rank's part."""
        assert self.teacher is not None
        with self.clock.running(batches[0]["tokens"].device):
            states = states_SBD(
                self.teacher,
                self._rows(batches),
                mpu.get_tensor_model_parallel_group(),
                self.slices_sequence(),
            )
        return list(states.split(self.args.micro_batch_size, dim=1))

    def _rows(self, batches: list[Batch]) -> Rows:
        """What the teacher reads: the student's documents are the teacher's documents."""
        keys = ["tokens"]
        keys += ["position_ids"] * self.args.reset_position_ids
        keys += ["attention_mask"] * self.args.reset_attention_mask
        return {key: torch.cat([batch[key] for batch in batches]) for key in keys}

    def check_every_micro_batch(self, recorded: int) -> None:
        """Stop the run if the teacher did not take part as it must.

        Raises:
            RuntimeError: its losses in this step are not one for each micro-batch.
        """
        expected = get_num_microbatches() if self._owner_chunks else 0
        if recorded != expected:
            raise RuntimeError(
                f"Step {self.args.curr_iteration + 1}: --method {self.args.method} recorded "
                f"{recorded} losses with the teacher for {expected} micro-batches. Some path of "
                "Megatron bypassed it; please report the flags of this run."
            )

    def end_step(self) -> dict[str, torch.Tensor]:
        """Release the teacher after its last use."""
        if self.weight == 0.0 and self.teacher is not None:
            self.teacher = None
            torch.cuda.empty_cache()
        return {}

    # --- what it costs and what it does -------------------------------------------------------

    def extra_flops(self, tokens: int) -> float:
        """The teacher's forward pass in a guided step."""
        return tokens * self.facts.get("flops_per_token", 0.0) if self.weight > 0 else 0.0

    def describe(self) -> dict[str, Any]:
        """The teacher, for the run's `metrics.jsonl`."""
        return {"teacher": self.facts or None}

    def summary(self) -> list[str]:
        """The teacher and its own loss, with a warning if it guesses."""
        facts = self.facts
        if not facts:
            return ["the guidance is over, no teacher is loaded"]
        loss = facts["lm_loss"]
        lines = [
            f"teacher {facts['name']}: {facts['parameters'] / 1e6:.2f} M parameters, weights "
            f"{facts['fingerprint']}, loss {loss:.3f} on the first micro-batch"
        ]
        if self.args.seq_length > self.config.context:
            lines.append(
                f"the teacher reads rows of {self.args.seq_length} tokens in windows of "
                f"{self.config.context}, its context"
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


def _check_rows(config: TeacherConfig, args: Namespace) -> None:
    resets = [args.reset_position_ids, args.reset_attention_mask]
    if args.seq_length > config.context and any(resets):
        raise UsageError(
            f"--seq-length {args.seq_length} is longer than the context of --teacher-model "
            f"{config.name} ({config.context} tokens), which would read it in windows, and windows "
            "do not go with --reset-position-ids or --reset-attention-mask. Use shorter sequences "
            "or another teacher."
        )
    learned = args.position_embedding_type == "learned_absolute"
    if args.reset_position_ids and not args.reset_attention_mask and not learned:
        raise UsageError(
            "--reset-position-ids has no effect on a student with "
            f"--position-embedding-type {args.position_embedding_type}, but would change what "
            f"--teacher-model {config.name} sees. Remove it, or add --reset-attention-mask."
        )
    if args.reset_attention_mask and args.transformer_impl == "transformer_engine":
        raise UsageError(
            "--reset-attention-mask has no effect on a student with Transformer Engine's causal "
            f"attention, but would change what --teacher-model {config.name} sees. Remove it, or "
            "add --transformer-impl local."
        )
    if args.reset_attention_mask and not args.create_attention_mask_in_dataloader:
        raise UsageError(
            "--reset-attention-mask has no effect with --no-create-attention-mask-in-dataloader. "
            "Remove one of the two."
        )


def _share(facts: dict[str, Any]) -> dict[str, Any]:
    """Merge the facts of all ranks: only the owner stage knows the teacher."""
    gathered: list[dict[str, Any] | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, facts)
    merged: dict[str, Any] = {}
    for part in gathered:
        merged |= part or {}
    return merged
