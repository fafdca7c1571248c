"""What a run has whose teacher has another tokenizer: rows of the teacher's in every batch."""

import hashlib
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from megatron_let import hugging_face
from megatron_let.data.tokenizer import HuggingFace, TokenizerConfig, load_tokenizer
from megatron_let.errors import UsageError
from megatron_let.translation.rows import Translated, Translator, measure
from megatron_let.translation.token_bytes import TokenBytes
from megatron_let.upstream.batch import TEACHER_INDEX, TEACHER_TOKENS, Batch


class Translation:
    """The teacher's rows: made in the dataset's workers, and read from batches on the device.

    `source` is the folder or hub id of the teacher's tokenizer.
    """

    def __init__(self, args: Namespace, source: str | Path, revision: str | None) -> None:
        self._args = args
        if args.teacher_seq_length is not None and args.teacher_seq_length < 1:
            raise UsageError(f"--teacher-seq-length {args.teacher_seq_length} must be at least 1.")
        self._translator = build_translator(args, source, revision)
        described = self._translator.teacher.tokenizer.fast.to_str()
        described += f"{self._translator.start} {self._translator.end}"
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()[:8]
        """Eight hexadecimal digits that change with anything the teacher's tokenizer does."""
        self.length: int | None = args.teacher_seq_length
        """Of the teacher's rows, in its tokens; measured where the data is, then told to all."""
        self._dataset: Translated | None = None
        self.share = 0.0
        """Of the tokens that have a target, in the run's first rows."""
        apart = args.reset_position_ids or args.reset_attention_mask
        if apart and not self._translator.end:
            raise UsageError(
                f"--teacher-model {args.teacher_model} has no end token, by which its documents "
                "could be kept apart: leave out --reset-position-ids and --reset-attention-mask."
            )

    def dataset(self, dataset: Any) -> Translated:
        """Samples with the teacher's rows; UsageError if nothing in the first ones has a target."""
        length = self.length or self._args.teacher_row_tokens  # a checkpoint's
        self.length, self.share = measure(dataset, self._translator, length)
        if not self.share:
            raise UsageError(
                f"In the run's first rows no token ends where one of --teacher-model "
                f"{self._args.teacher_model} does within --teacher-seq-length {self.length}."
            )
        self._dataset = Translated(dataset, self._translator, self.length)
        return self._dataset

    def largest_id(self) -> int:
        """Of those that the teacher is given: no text makes a special token."""
        made = self._translator
        return max(int(made.teacher.lengths.nonzero()[0].max()), *made.start, *made.end)

    def stop(self) -> None:
        """The guidance is over."""
        if self._dataset is not None:
            self._dataset.stop()

    def keys(self) -> dict[str, int]:
        """What batches have besides, with the rows' lengths."""
        assert self.length is not None
        return {TEACHER_TOKENS: self.length, TEACHER_INDEX: self._args.seq_length}

    def rows(self, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
        """What the teacher reads (`teacher.stage.Rows`) of some whole batches."""
        tokens_BT = torch.cat([batch[TEACHER_TOKENS] for batch in batches])
        rows = {"tokens": tokens_BT}
        begins_BT = self._begins(tokens_BT)
        position_T = torch.arange(tokens_BT.size(1), device=tokens_BT.device)
        if self._args.reset_position_ids:
            starts_BT = torch.where(begins_BT, position_T, 0).cummax(1).values
            rows["position_ids"] = position_T - starts_BT
        if self._args.reset_attention_mask:
            document_BT = begins_BT.cumsum(1)
            later = position_T[None, :] > position_T[:, None]
            other = document_BT[:, None, :] != document_BT[:, :, None]
            rows["attention_mask"] = (other | later)[:, None]
        return rows

    def _begins(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Where a document begins: behind an end, if all that is in front of one follows it."""
        begins_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
        for end in self._translator.end:
            begins_BT[:, 1:] = tokens_BT[:, :-1] == end
        for i, token in enumerate(self._translator.start):
            length = tokens_BT.size(1) - i
            begins_BT[:, :length] &= tokens_BT[:, i:] == token
        return begins_BT

    def scored(self, sample: Batch) -> Batch:
        """The teacher's own tokens, labels and loss mask `[T]` of a sample, to its last target."""
        tokens_T, last = sample[TEACHER_TOKENS], sample[TEACHER_INDEX].max()
        mask_T = torch.arange(len(tokens_T)) < last
        return {"tokens": tokens_T, "labels": tokens_T.roll(-1), "loss_mask": mask_T}

    def summary(self) -> str:
        """How the two meet."""
        line = (
            f"the teacher has a tokenizer of its own: rows of {self._args.seq_length} tokens take "
            f"up to {self.length} of its tokens, and {100 * self.share:.1f} % of the tokens end "
            "where one of them does and are guided (the first rows)"
        )
        return line if self.share >= 0.5 else f"WARNING: {line}"


def build_translator(args: Namespace, source: str | Path, revision: str | None) -> Translator:
    """Load both tokenizers, the teacher's from `source`; UsageError if one does not go with it."""
    # With threads of its own a tokenizer hangs in a worker that is forked later.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    names = [field.name for field in fields(TokenizerConfig)]
    try:
        student = load_tokenizer(TokenizerConfig(**{name: vars(args)[name] for name in names}))
    except ValueError as error:
        raise UsageError(f"With a teacher of another tokenizer: {error}.") from error
    flag = f"--teacher-model {source}"
    failure = f"The tokenizer of {flag} cannot be loaded."
    found = hugging_face.load(AutoTokenizer, source, failure, revision=revision)
    if not found.is_fast:
        raise UsageError(
            f"{flag} has no tokenizer.json, without which its tokenizer is too slow to read the "
            "student's text again: save it in its fast form."
        )
    own = f"--tokenizer-model {args.tokenizer_model or args.vocab_file}"
    return Translator(TokenBytes(student, own), TokenBytes(HuggingFace(found, (), True), flag))
