"""Methods with a teacher: its life on its pipeline stages, from loading to release."""

import math
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import get_tokenizer

from megatron_let.errors import UsageError
from megatron_let.methods.base import WHOLE, Batch, Method
from megatron_let.methods.signal import Signal
from megatron_let.teacher.clock import Clock
from megatron_let.teacher.load import (
    DTYPES,
    TeacherConfig,
    check_token_ids,
    fingerprint,
    load_causal_lm,
    read_teacher_config,
    read_token_ids,
    untrained_causal_lm,
)
from megatron_let.teacher.split import needed_positions, own_slice, states_SBD
from megatron_let.teacher.stage import Rows, Teacher, near_random
from megatron_let.teacher.work import micro_batches_at_once

CONTROLS = {
    "random": "CONTROL: the teacher is untrained",
    "shuffled": "CONTROL: the teacher's states are those of shuffled positions",
    "zero": "CONTROL: the teacher works, and nothing of it reaches the student",
}


class TeacherMethod(Method):
    """A frozen teacher runs on the chunks of the pipeline that its signals need, while they last.

    Args:
        args: the checked command line.
        signals: the classes of the ways in which the teacher guides.
    """

    def __init__(self, args: Namespace, signals: Sequence[type[Signal]]) -> None:
        super().__init__(args)
        args.teacher_fingerprint = None  # saved in checkpoints
        self.config = _read_config(args)
        self.signals = [signal(args, self.config) for signal in signals]
        self.same_on_resume = ("teacher_control",) + sum(
            (signal.same_on_resume for signal in self.signals), ()
        )
        self.teacher: Teacher | None = None
        self.clock = Clock()
        self.facts: dict[str, Any] = {}
        """About the teacher, the same on all ranks; empty if none was loaded."""
        self._transformer: TransformerConfig
        self._layer = _common_layer(self.signals)
        _check_rows(self.config, args)

    @property
    def is_guided(self) -> bool:
        """Whether the teacher takes part in the current step."""
        return any(signal.weight > 0 for signal in self.signals)

    @property
    def _own_signals(self) -> list[Signal]:
        """Those with a chunk on this rank."""
        return [signal for signal in self.signals if signal.owner_chunks]

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
        for signal in self.signals:
            signal.check_checkpoint(saved)
        if not self.args.finetune:
            self.args.teacher_fingerprint = vars(saved).get("teacher_fingerprint")

    def configure(self, model_config: Any) -> None:
        """Remember Megatron's `TransformerConfig`, and let the signals change theirs."""
        self._transformer = model_config.transformer
        for signal in self.signals:
            signal.configure(model_config)

    def reads_batch(self, vp_stage: int | None) -> bool:
        """The chunks that need the teacher."""
        return any(vp_stage in signal.owner_chunks for signal in self.signals)

    def training_data(self, dataset: Any) -> Any:
        """The stream that the signals make of it."""
        for signal in self.signals:
            dataset = signal.training_data(dataset)
        return dataset

    def on_data(self, train_dataset: Any) -> None:
        """Load the teacher on its stages and score it on the run's first micro-batch.

        Reading a sample by its index consumes nothing of the data order.
        """
        self._set_weights(self.args.iteration)
        if any(signal.weight > 0 for signal in self._own_signals):
            self.load()
            self._score(train_dataset)
            self.prepare_teacher()
        stage = mpu.get_pipeline_model_parallel_rank()
        chunks = [[(stage, vp) for vp in signal.owner_chunks] for signal in self.signals]
        self.facts = _share(self.facts, chunks)
        if self.facts:
            self._check_fingerprint()

    def _set_weights(self, step: int) -> None:
        for signal in self.signals:
            signal.weight = signal.weight_at(step, self.args.consumed_train_samples)

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
        control = self.args.teacher_control
        load = untrained_causal_lm if control == "random" else load_causal_lm
        model = load(self.config, dtype, device)
        length = self.args.seq_length
        self.teacher = Teacher(model, self.config.context, self._layer, control == "shuffled")
        self.facts = {
            "name": self.config.name,
            "parameters": self.teacher.parameters,
            "stages": [mpu.get_pipeline_model_parallel_rank()],
            "fingerprint": fingerprint(model),
            "flops_per_token": self.teacher.forward_flops(length, length) / length,
        }

    def prepare_teacher(self) -> None:
        """Let the signals take what they need of a whole teacher; drop the rest."""
        assert self.teacher is not None
        for signal in self._own_signals:
            signal.prepare(self.teacher)
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
        """Fix the step's weights before Megatron moves its counters on."""
        self._set_weights(self.args.curr_iteration)
        for signal in self.signals:
            signal.start_step()

    def micro_batches_at_once(self) -> int:
        """So many that their rows can be dealt evenly over the ranks that share them."""
        if not self.is_guided:
            return 1
        ranks = mpu.get_tensor_and_context_parallel_world_size()
        return micro_batches_at_once(self.args.micro_batch_size, ranks)

    def before_forward(self, batches: list[Batch], vp_stage: int | None) -> None:
        """Run the teacher once for all signals of the chunk, and hand its states to each."""
        guided = [s for s in self.signals if s.weight > 0 and vp_stage in s.owner_chunks]
        if not guided:
            return
        sliced = all(signal.slices_sequence() for signal in guided)
        states = self.teacher_states(batches, sliced)
        for signal in guided:
            own = states
            if signal.slices_sequence() and not sliced:
                group = mpu.get_tensor_model_parallel_group()
                own = [own_slice(states_SBD, group) for states_SBD in states]
            signal.push(batches, own)

    def teacher_states(self, batches: list[Batch], sliced: bool) -> list[torch.Tensor]:
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

    def language_model_losses(self) -> torch.Tensor | None:
        """From the signal that has replaced the model's loss, if one has."""
        every = (signal.language_model_losses() for signal in self.signals)
        return next((losses_BS for losses_BS in every if losses_BS is not None), None)

    def _rows(self, batches: list[Batch]) -> Rows:
        """What the teacher reads: the student's documents are the teacher's documents."""
        keys = ["tokens"]
        keys += ["position_ids"] * self.args.reset_position_ids
        keys += ["attention_mask"] * self.args.reset_attention_mask
        wholes = [batch.get(WHOLE, batch) for batch in batches]
        return {key: torch.cat([whole[key] for whole in wholes]) for key in keys}

    def end_step(self) -> dict[str, torch.Tensor]:
        """Sum the step's records over all ranks; release the teacher after its last use."""
        if not any(signal.weight > 0 for signal in self._own_signals):
            self._release()
        guided = [signal for signal in self.signals if signal.weight > 0]
        if not guided:
            return {}
        for signal in guided:
            self.check_every_micro_batch(signal)
        parts = [signal.sums() for signal in guided]
        zero = torch.zeros((), device=torch.cuda.current_device())
        works = float(any(signal.owner_chunks for signal in guided))
        sums = torch.stack([*sum(parts, []), zero + self.clock.read(), zero + works])
        torch.distributed.all_reduce(sums)
        *sums_1, milliseconds, workers = sums.split(1)
        report: dict[str, torch.Tensor] = {}
        for signal, part in zip(guided, parts, strict=True):
            report |= signal.report(sums_1[: len(part)])
            sums_1 = sums_1[len(part) :]
        return report | {"teacher time (ms)": milliseconds / workers}

    def check_every_micro_batch(self, signal: Signal) -> None:
        """Stop the run if the teacher did not take part as it must.

        Raises:
            RuntimeError: its losses in this step are not one for each micro-batch.
        """
        expected = get_num_microbatches() if signal.owner_chunks else 0
        if signal.num_used != expected:
            raise RuntimeError(
                f"Step {self.args.curr_iteration + 1}: --method {self.args.method} recorded "
                f"{signal.num_used} losses with the teacher for {expected} micro-batches. Some "
                "path of Megatron bypassed it; please report the flags of this run."
            )

    def _release(self) -> None:
        if self.teacher is not None:
            self.teacher = None
            for signal in self.signals:
                signal.release()
            torch.cuda.empty_cache()

    # --- what it costs and what it does -------------------------------------------------------

    def extra_flops(self, tokens: int) -> float:
        """The teacher's forward passes in a guided step, one on each chunk that needs them."""
        guided = [i for i, signal in enumerate(self.signals) if signal.weight > 0]
        if not guided or not self.facts:
            return 0.0
        chunks = {place for i in guided for place in self.facts["chunks"][i]}
        own = sum(self.signals[i].flops_per_token() for i in guided)
        return tokens * (len(chunks) * self.facts["flops_per_token"] + own)

    def flops_once(self) -> float:
        """What was spent before the first step."""
        return sum(signal.flops_once() for signal in self.signals)

    def describe(self) -> dict[str, Any]:
        """The teacher, for the run's `metrics.jsonl`."""
        return {"teacher": self.facts or None}

    def summary(self) -> list[str]:
        """The signals, the teacher and its own loss, with a warning if it guesses."""
        lines = [signal.summary() for signal in self.signals]
        facts = self.facts
        if not facts:
            return [*lines, "the guidance is over, no teacher is loaded"]
        loss, stages = facts["lm_loss"], facts["stages"]
        lines += [
            f"the teacher runs on pipeline stage {' and '.join(map(str, stages))} of "
            f"{self.args.pipeline_model_parallel_size} (from 0)",
            f"teacher {facts['name']}: {facts['parameters'] / 1e6:.2f} M parameters, weights "
            f"{facts['fingerprint']}, loss {loss:.3f} on the first micro-batch",
        ]
        if self.args.teacher_control != "none":
            lines.append(CONTROLS[self.args.teacher_control])
        if self.args.seq_length > self.config.context:
            lines.append(
                f"the teacher reads rows of {self.args.seq_length} tokens in windows of "
                f"{self.config.context}, its context"
            )
        if near_random(loss, self.config.vocab_size) and self.args.teacher_control != "random":
            lines.append(
                f"WARNING: a loss of {loss:.3f} is close to ln(vocabulary) = "
                f"{math.log(self.config.vocab_size):.3f}: the teacher {facts['name']} guesses. "
                "Was it trained, on such text, with this tokenizer?"
            )
        return lines


def _common_layer(signals: list[Signal]) -> int | None:
    layers = {signal.teacher_layer() for signal in signals}
    if len(layers) > 1:
        raise UsageError(
            "Distillation needs the teacher's last layer, so --method let+salt aligns with it too: "
            "remove --let-teacher-layer."
        )
    return layers.pop()


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


def _share(facts: dict[str, Any], chunks: list[list[tuple[int, int | None]]]) -> dict[str, Any]:
    """Merge the facts of all ranks: only the stages with the teacher know it.

    Args:
        facts: this rank's.
        chunks: for each signal this rank's chunks that need the teacher, as (stage, virtual stage).
    """
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, (facts, chunks))
    merged: dict[str, Any] = {}
    for part, _ in gathered:
        stages = {*merged.get("stages", []), *part.get("stages", [])}
        merged |= part | ({"stages": sorted(stages)} if stages else {})
    if merged:
        merged["chunks"] = [
            sorted({chunk for _, every in gathered for chunk in every[i]}, key=str)
            for i in range(len(chunks))
        ]
    return merged
