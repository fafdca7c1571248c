"""A teacher's life on one rank: loaded, scored, run for the student's micro-batches, released."""

import contextlib
import gc
import math
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.training import get_tokenizer

from megatron_let.errors import UsageError, first_line
from megatron_let.hugging_face import own_folder
from megatron_let.teacher import load, probe
from megatron_let.teacher.load import DTYPES, TeacherConfig, numbers_alike
from megatron_let.teacher.stage import Rows, Teacher, near_random, text_model
from megatron_let.translation.run import Translation
from megatron_let.upstream.batch import TEACHER_INDEX, WHOLE, Batch

CONTROLS = {
    "random": "CONTROL: the teacher is untrained",
    "shuffled": "CONTROL: the teacher's states are those of shuffled positions",
    "zero": "CONTROL: the teacher works, and nothing of it reaches the student",
}


class Clock:
    """Adds up spans of work by events, which nothing waits for until they are read."""

    def __init__(self) -> None:
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count what is done inside."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._spans.append((start, end))

    def read(self) -> float:
        """Return the milliseconds since the last reading; the device must have done its work."""
        spans, self._spans = self._spans, []
        return sum(start.elapsed_time(end) for start, end in spans)


class TeacherHost:
    """A frozen model beside the student's chunks that need it; the run's methods come and ask.

    `layer`, from 1, is the one whose states are wanted; None for the last, after the final norm.
    """

    def __init__(self, args: Namespace, config: TeacherConfig, layer: int | None) -> None:
        self.args = args
        self.config = config
        self.teacher: Teacher | None = None
        self.clock = Clock()
        self.translation: Translation | None = None
        """Where the teacher has another tokenizer."""
        self.facts: dict[str, Any] = {}
        """About the teacher, the same on all ranks after `share`; empty if none was loaded."""
        self._layer = layer
        self._positions_RS: dict[bool, torch.Tensor] = {}
        check_rows(config, args, args.seq_length)

    # --- before the run -----------------------------------------------------------------------

    def check_tokens(self, student_ids: dict[str, int], same: bool) -> None:
        """Compare the two tokenizers, and the largest id with the teacher's rows.

        `student_ids` is the student's token -> id, empty if unknown; `same` says whether the
        teacher must have that tokenizer, or may have rows of its own.
        """
        name, revision = self.config.name, self.config.revision
        teacher_ids = load.read_token_ids(name, revision)
        if student_ids and teacher_ids and not same and not numbers_alike(student_ids, teacher_ids):
            try:
                self.translation = Translation(self.args, str(own_folder(Path(name))), revision)
            except UsageError as error:
                what = "Student and teacher number tokens differently."
                raise type(error)(f"{what} {error}") from error
            largest = self.translation.largest_id()
        elif self.args.teacher_seq_length is not None:
            raise UsageError(
                f"--teacher-seq-length {self.args.teacher_seq_length} has no effect: the teacher "
                f"{name} reads the student's own tokens. Remove it."
            )
        elif student_ids and teacher_ids:
            load.check_token_ids(student_ids, teacher_ids, name)
            # No text makes a special token; Gemma 3 has one more than rows.
            made = [index for token, index in student_ids.items() if token not in teacher_ids.added]
            largest = max(get_tokenizer().eod or 0, *made)
        else:
            largest = get_tokenizer().vocab_size - 1
        if largest >= self.config.vocab_size:
            raise UsageError(
                f"--teacher-model {name} knows {self.config.vocab_size} token ids, and would be "
                f"given ids up to {largest}: choose a teacher of the same tokenizer, or give its "
                "embedding a row for each token (resize_token_embeddings)."
            )

    def translated(self, dataset: Any) -> Any:
        """Samples as the teacher wants them."""
        return dataset if self.translation is None else self.translation.dataset(dataset)

    def further_keys(self) -> dict[str, int]:
        """What batches have of that, see `Translation.keys`."""
        return {} if self.translation is None else self.translation.keys()

    def agree(self, guides: bool) -> None:
        """Tell all ranks, of which few hold the data, how long the teacher's rows are.

        Where the teacher `guides` on no rank, there are none.
        """
        if not guides or self.translation is None:
            self.translation = None
            return
        known: list[Any] = [None] * torch.distributed.get_world_size()
        own = self.translation.share, self.translation.length
        torch.distributed.all_gather_object(known, own)
        self.translation.share, self.translation.length = max(known)
        self.args.teacher_row_tokens = self.translation.length  # saved in checkpoints
        check_rows(self.config, self.args, self._row_length())

    def load(self, student_dtype: torch.dtype) -> None:
        """Load the model on this rank's device."""
        dtype = DTYPES.get(self.args.teacher_dtype, student_dtype)
        control = self.args.teacher_control
        model = load.load_causal_lm(self.config, dtype, _device(), untrained=control == "random")
        name, context, vocab_size = self.config.name, self.config.context, self.config.vocab_size
        length, windowed = self._row_length(), True
        try:
            probe.check_weights(model, name, self.config.revision)
            base = text_model(model)
            probe.check_states(base, vocab_size, name)
            if self.args.reset_attention_mask:
                windowed = probe.check_documents(base, vocab_size, min(length, context), name)
            self.teacher = Teacher(model, context, self._layer, control == "shuffled", windowed)
        except (UsageError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # each kind of model has its own
            raise UsageError(
                f"--teacher-model {name} cannot be a teacher ({first_line(error)})."
            ) from error
        self.facts = {
            "name": name,
            "parameters": self.teacher.parameters,
            "stages": [mpu.get_pipeline_model_parallel_rank()],
            "fingerprint": load.fingerprint(model),
            "flops_per_token": self.teacher.forward_flops(length, length) / self.args.seq_length,
        }
        if self.translation is not None:
            self.facts["fingerprint"] += f"-{self.translation.fingerprint}"
            self.facts |= {"row_tokens": length, "guided_share": self.translation.share}

    def _row_length(self) -> int:
        """Of a row as the teacher reads it, in its tokens."""
        length = None if self.translation is None else self.translation.length
        return length or self.args.seq_length

    def score(self, train_dataset: Any) -> None:
        """Note the model's own loss on the first micro-batch, where this rank holds the data.

        Reading a sample by its index consumes nothing of the data order.
        """
        if train_dataset is None:  # only tensor-parallel rank 0 of a stage holds the data
            return
        samples = [train_dataset[i] for i in range(self.args.micro_batch_size)]
        if self.translation is not None:
            samples = [self.translation.scored(sample) for sample in samples]
        tokens, labels, mask = (
            torch.stack([torch.as_tensor(sample[key]) for sample in samples]).to(_device())
            for key in ("tokens", "labels", "loss_mask")
        )
        assert self.teacher is not None
        self.facts["lm_loss"] = self.teacher.lm_loss({"tokens": tokens}, labels, mask)

    def share(self, chunks: list[list[tuple[int, int | None]]]) -> None:
        """Merge the facts of all ranks: only the stages with the teacher know it.

        `chunks` are for each signal this rank's that need it, as (stage, virtual stage). Raises
        UsageError on all ranks if the loss of `score` is not finite.
        """
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, (self.facts, chunks))
        known = [facts for facts, _ in gathered if facts]
        self.facts = {name: value for facts in known for name, value in facts.items()}
        if known:
            loss = self.facts["lm_loss"]
            if not math.isfinite(loss):
                dtype = DTYPES.get(self.args.teacher_dtype, self.args.params_dtype)
                raise UsageError(
                    f"--teacher-model {self.config.name} has a loss of {loss} on the first "
                    f"micro-batch in {dtype}: it overflows there, or is damaged. Try "
                    "--teacher-dtype bf16 or fp32."
                )
            self.facts["stages"] = sorted({stage for facts in known for stage in facts["stages"]})
            self.facts["chunks"] = [
                sorted({chunk for _, every in gathered for chunk in every[i]}, key=str)
                for i in range(len(chunks))
            ]

    # --- during the run -----------------------------------------------------------------------

    def states(self, batches: Sequence[Batch], *, sliced: bool) -> list[torch.Tensor]:
        """The teacher's states `[S, b, D]` for each of the chunk's next micro-batches.

        `sliced` where this rank needs its slice under sequence parallelism only.
        """
        assert self.teacher is not None
        wholes = [batch.get(WHOLE, batch) for batch in batches]
        rows, group = self._rows(wholes), mpu.get_tensor_and_context_parallel_group()
        index_BS = None
        if self.translation is not None:
            index_BS = torch.cat([whole[TEACHER_INDEX] for whole in wholes])
        if sliced not in self._positions_RS:  # a copy to the device is waited for
            self._positions_RS[sliced] = needed_positions(
                self.args.seq_length,
                mpu.get_tensor_model_parallel_world_size(),
                mpu.get_context_parallel_world_size(),
                sliced,
            ).to(_device())
        with self.clock.running():
            states = states_SBD(self.teacher, rows, group, self._positions_RS[sliced], index_BS)
        return list(states.split(self.args.micro_batch_size, dim=1))

    def _rows(self, wholes: Sequence[Batch]) -> Rows:
        """What the teacher reads: the student's documents are the teacher's documents."""
        if self.translation is not None:
            return self.translation.rows(wholes)
        keys = ["tokens"]
        keys += ["position_ids"] * self.args.reset_position_ids
        keys += ["attention_mask"] * self.args.reset_attention_mask
        return {key: torch.cat([whole[key] for whole in wholes]) for key in keys}

    def release(self) -> None:
        """Free the model's memory."""
        self.teacher = None
        if self.translation is not None:
            self.translation.stop()
        gc.collect()  # a compiled layer and what it was compiled to hold each other
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
        if self.translation is not None:
            lines.append(self.translation.summary())
        if self._row_length() > config.context:
            lines.append(
                f"the teacher reads rows of {self._row_length()} tokens in windows of "
                f"{config.context}, its context"
            )
        if near_random(loss, config.vocab_size) and self.args.teacher_control != "random":
            lines.append(
                f"WARNING: a loss of {loss:.3f} is close to ln(vocabulary) = "
                f"{math.log(config.vocab_size):.3f}: the teacher {facts['name']} guesses. "
                "Was it trained, on such text, with this tokenizer?"
            )
        return lines


def states_SBD(
    teacher: Teacher,
    rows: Rows,
    group: Any,
    positions_RS: torch.Tensor,
    index_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the teacher's states of all rows at this rank's positions, `[own S, rows, D]`.

    All ranks of a tensor- and context-parallel group have the same whole rows to guide. Each runs
    the teacher on its share of them and then gets from the others what its own part of the student
    needs: every row, and of each its `needed_positions`. A number of rows that does not divide by
    the ranks is filled up, which costs time and nothing else. `index_BS` has for each of the
    student's tokens the teacher's whose states it takes; None where both read the same ones.
    """
    ranks, number = group.size(), rows["tokens"].size(0)
    share = math.ceil(number / ranks)
    device = rows["tokens"].device
    own = torch.arange(group.rank() * share, (group.rank() + 1) * share, device=device) % number
    states_BSD = teacher.states_BSD({key: value[own] for key, value in rows.items()})
    if index_BS is not None:  # before the sequence is cut: a target may lie on another rank
        places_BS1 = index_BS[own].clamp(min=0)[..., None]  # any, where there is no target
        states_BSD = states_BSD.gather(1, places_BS1.expand(-1, -1, states_BSD.size(-1)))
    if ranks == 1:
        return states_BSD.transpose(0, 1).contiguous()
    wanted = states_BSD[:, positions_RS].transpose(0, 1).contiguous()
    received = torch.empty_like(wanted)  # [rank it comes from, its rows, own positions, D]
    torch.distributed.all_to_all_single(received, wanted, group=group)
    return received.flatten(0, 1)[:number].transpose(0, 1).contiguous()


def needed_positions(
    length: int, tensor_parallel: int, context_parallel: int, sequence_parallel: bool
) -> torch.Tensor:
    """Positions of a row that each rank of a tensor- and context-parallel group holds, `[R, S]`.

    Context parallelism gives a rank two of `2 * context_parallel` chunks, one from each end
    (Megatron's `get_batch_on_this_cp_rank`); sequence parallelism cuts that into contiguous slices.
    Tensor-parallel ranks are neighbours in the group.
    """
    chunks = torch.arange(length).chunk(2 * context_parallel)
    pairs = [torch.cat([chunks[i], chunks[-1 - i]]) for i in range(context_parallel)]
    if sequence_parallel:
        return torch.cat([pair.view(tensor_parallel, -1) for pair in pairs])
    return torch.stack(pairs).repeat_interleave(tensor_parallel, dim=0)


def _device() -> torch.device:
    return torch.device(torch.cuda.current_device())


def check_rows(config: TeacherConfig, args: Namespace, length: int) -> None:
    """Refuse rows, of `length` tokens of the teacher's, that it would read otherwise."""
    positions, masks = args.reset_position_ids, args.reset_attention_mask
    no_effect = f"but would change what --teacher-model {config.name} sees. Remove it, or add"
    if length > config.context and (positions or masks):
        own = "" if length == args.seq_length else f", {length} of the teacher's tokens,"
        raise UsageError(
            f"--seq-length {args.seq_length}{own} is longer than the context of --teacher-model "
            f"{config.name} ({config.context} tokens), and the windows that it would read do not "
            "go with --reset-position-ids or --reset-attention-mask. Use shorter sequences or "
            "another teacher."
        )
    embedding = args.position_embedding_type
    if positions and not masks and embedding != "learned_absolute":
        raise UsageError(
            "--reset-position-ids has no effect on a student with --position-embedding-type "
            f"{embedding}, {no_effect} --reset-attention-mask."
        )
    if masks and args.transformer_impl == "transformer_engine":
        raise UsageError(
            "--reset-attention-mask has no effect on a student with Transformer Engine's causal "
            f"attention, {no_effect} --transformer-impl local."
        )
    if masks and not args.create_attention_mask_in_dataloader:
        raise UsageError(
            "--reset-attention-mask has no effect with --no-create-attention-mask-in-dataloader. "
            "Remove one of the two."
        )
