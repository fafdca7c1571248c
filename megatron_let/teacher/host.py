"""A teacher's life on one rank: loaded, scored, run for the student's micro-batches, released."""

import math
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import mpu
from megatron.training import get_tokenizer

from megatron_let.errors import UsageError
from megatron_let.teacher.clock import Clock
from megatron_let.teacher.load import (
    DTYPES,
    TeacherConfig,
    check_token_ids,
    fingerprint,
    load_causal_lm,
    read_token_ids,
    untrained_causal_lm,
)
from megatron_let.teacher.split import needed_positions, states_SBD
from megatron_let.teacher.stage import Rows, Teacher, near_random
from megatron_let.upstream.batch import WHOLE, Batch

CONTROLS = {
    "random": "CONTROL: the teacher is untrained",
    "shuffled": "CONTROL: the teacher's states are those of shuffled positions",
    "zero": "CONTROL: the teacher works, and nothing of it reaches the student",
}


class TeacherHost:
    """A frozen model beside the student's chunks that need it; the run's methods come and ask.

    Args:
        args: the checked command line: `--teacher-*` and what rows look like.
        config: the model's.
        layer: whose states are wanted, from 1; None for the last, after the final norm.
    """

    def __init__(self, args: Namespace, config: TeacherConfig, layer: int | None) -> None:
        self.args = args
        self.config = config
        self.teacher: Teacher | None = None
        self.clock = Clock()
        self.facts: dict[str, Any] = {}
        """About the teacher, the same on all ranks after `share`; empty if none was loaded."""
        self._layer = layer
        check_rows(config, args)

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

    def load(self, student_dtype: torch.dtype) -> Teacher:
        """Load the model on this rank's device; returns it."""
        dtype = DTYPES.get(self.args.teacher_dtype, student_dtype)
        control = self.args.teacher_control
        load = untrained_causal_lm if control == "random" else load_causal_lm
        model = load(self.config, dtype, _device())
        length = self.args.seq_length
        self.teacher = Teacher(model, self.config.context, self._layer, control == "shuffled")
        self.facts = {
            "name": self.config.name,
            "parameters": self.teacher.parameters,
            "stages": [mpu.get_pipeline_model_parallel_rank()],
            "fingerprint": fingerprint(model),
            "flops_per_token": self.teacher.forward_flops(length, length) / length,
        }
        return self.teacher

    def score(self, train_dataset: Any) -> None:
        """Note the model's own loss on the first micro-batch, where this rank holds the data.

        Reading a sample by its index consumes nothing of the data order.
        """
        if train_dataset is None:  # only tensor-parallel rank 0 of a stage holds the data
            return
        samples = [train_dataset[i] for i in range(self.args.micro_batch_size)]
        tokens, labels, mask = (
            torch.stack([torch.as_tensor(sample[key]) for sample in samples]).to(_device())
            for key in ("tokens", "labels", "loss_mask")
        )
        assert self.teacher is not None
        self.facts["lm_loss"] = self.teacher.lm_loss({"tokens": tokens}, labels, mask)

    def share(self, chunks: list[list[tuple[int, int | None]]]) -> None:
        """Merge the facts of all ranks: only the stages with the teacher know it.

        Args:
            chunks: for each signal this rank's chunks that need the teacher, as (stage, virtual
                stage).
        """
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, (self.facts, chunks))
        merged: dict[str, Any] = {}
        for part, _ in gathered:
            stages = {*merged.get("stages", []), *part.get("stages", [])}
            merged |= part | ({"stages": sorted(stages)} if stages else {})
        if merged:
            merged["chunks"] = [
                sorted({chunk for _, every in gathered for chunk in every[i]}, key=str)
                for i in range(len(chunks))
            ]
        self.facts = merged

    # --- during the run -----------------------------------------------------------------------

    def states(self, batches: Sequence[Batch], *, sliced: bool) -> list[torch.Tensor]:
        """The teacher's states `[S, b, D]` for each of some micro-batches.

        Args:
            batches: the chunk's next micro-batches.
            sliced: whether this rank needs its slice under sequence parallelism only.
        """
        assert self.teacher is not None
        rows, group = self._rows(batches), mpu.get_tensor_and_context_parallel_group()
        positions_RS = needed_positions(
            self.args.seq_length,
            mpu.get_tensor_model_parallel_world_size(),
            mpu.get_context_parallel_world_size(),
            sliced,
        )
        with self.clock.running():
            states = states_SBD(self.teacher, rows, group, positions_RS)
        return list(states.split(self.args.micro_batch_size, dim=1))

    def _rows(self, batches: Sequence[Batch]) -> Rows:
        """What the teacher reads: the student's documents are the teacher's documents."""
        keys = ["tokens"]
        keys += ["position_ids"] * self.args.reset_position_ids
        keys += ["attention_mask"] * self.args.reset_attention_mask
        wholes = [batch.get(WHOLE, batch) for batch in batches]
        return {key: torch.cat([whole[key] for whole in wholes]) for key in keys}

    def release(self) -> None:
        """Free the model's memory."""
        self.teacher = None
        torch.cuda.empty_cache()

    # --- what it is ---------------------------------------------------------------------------

    def summary(self) -> list[str]:
        """The teacher and its own loss, with a warning if it guesses."""
        facts, config = self.facts, self.config
        if not facts:
            return ["the guidance is over, no teacher is loaded"]
        loss, stages = facts["lm_loss"], facts["stages"]
        lines = [
            f"the teacher runs on pipeline stage {' and '.join(map(str, stages))} of "
            f"{self.args.pipeline_model_parallel_size} (from 0)",
            f"teacher {facts['name']}: {facts['parameters'] / 1e6:.2f} M parameters, weights "
            f"{facts['fingerprint']}, loss {loss:.3f} on the first micro-batch",
        ]
        if self.args.teacher_control != "none":
            lines.append(CONTROLS[self.args.teacher_control])
        if self.args.seq_length > config.context:
            lines.append(
                f"the teacher reads rows of {self.args.seq_length} tokens in windows of "
                f"{config.context}, its context"
            )
        if near_random(loss, config.vocab_size) and self.args.teacher_control != "random":
            lines.append(
                f"WARNING: a loss of {loss:.3f} is close to ln(vocabulary) = "
                f"{math.log(config.vocab_size):.3f}: the teacher {facts['name']} guesses. "
                "Was it trained, on such text, with this tokenizer?"
            )
        return lines


def _device() -> torch.device:
    return torch.device(torch.cuda.current_device())


def check_rows(config: TeacherConfig, args: Namespace) -> None:
    """Refuse rows that the teacher would read otherwise than the student.

    Raises:
        UsageError: naming the flags.
    """
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
