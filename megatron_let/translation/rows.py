"""A student's packed rows as a teacher with another tokenizer reads them.

A student's token has a target where a token of the teacher ends at the same byte: then both have
read the same text, and nothing of what comes later (docs/other_tokenizers.md).
"""

import itertools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from megatron_let.data.engines import added_around
from megatron_let.translation.token_bytes import TokenBytes
from megatron_let.upstream.batch import TEACHER_INDEX, TEACHER_TOKENS

MEASURED_ROWS, MARGIN, MULTIPLE = 64, 1.1, 16
"""A row of the teacher's is so much longer than the longest of the run's first rows."""
NOTHING = -1
"""Index of a student's token that has no target."""
WORDS = 16
"""So many at most hang together: a text without spaces would for ever."""
TOKENS = 64
"""Of such a piece so many are tried; of what comes behind them nothing is known."""
REMEMBERED = 1 << 17
"""Pieces of text, most of which come again."""


class Translator:
    """Rows of a student's tokens to rows of a teacher's.

    Documents end with the end token; the teacher's begin with what its tokenizer puts in front of a
    text, such as BOS.
    """

    def __init__(self, student: TokenBytes, teacher: TokenBytes) -> None:
        self.student, self.teacher = student, teacher
        self._eod = student.tokenizer.eod
        end = teacher.tokenizer.eod
        self.end = [] if end is None else [end]
        """The teacher's end of a document."""
        self.start, _ = added_around(teacher.tokenizer)
        """What is in front of each document."""
        self._settled = Settled(teacher)

    def row(self, tokens_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The teacher's tokens `[any]`, and for each of the student's an index into them.

        That is where it has its target, or `NOTHING`. Documents come one after the other; the first
        may have begun before the row.
        """
        index_S = np.full(len(tokens_S), NOTHING)
        teacher: list[int] = []
        start = 0
        for end in [*np.flatnonzero(tokens_S == self._eod), len(tokens_S)]:
            if end > start or 0 < start < len(tokens_S):
                ids, found = self._document(tokens_S[start:end], start > 0)
                shifted = found + len(teacher) + len(self.start)
                index_S[start:end] = np.where(found == NOTHING, NOTHING, shifted)
                teacher += self.start + ids
            if end < len(tokens_S) and self.end:
                index_S[end] = len(teacher)
                teacher += self.end
            start = end + 1
        return np.array(teacher, dtype=np.int64), index_S

    def _document(self, tokens_N: np.ndarray, begins: bool) -> tuple[list[int], np.ndarray]:
        """A document's tokens for the teacher, and the index of each of the student's `[N]`."""
        # Ids behind the tokenizer's, which pad the vocabulary, have no text.
        tokens_N = tokens_N.clip(max=len(self.student.bytes) - 1)
        lengths_N = self.student.lengths[tokens_N]
        data = self.student.join(tokens_N.tolist())
        skipped = _not_of_the_text(data, begins and self.student.adds_space)
        ends_N = lengths_N.cumsum() - skipped
        ids, words, ends = self._tokenized(_decoded(data[skipped:]))
        at_N = ends.searchsorted(ends_N)
        meets_N = np.append(ends, 0)[at_N] == ends_N
        at_N = np.where(meets_N & (ends_N > 0) & (lengths_N > 0), at_N, NOTHING)
        if self.teacher.looks_ahead and ids:
            at_N[~self._settled.flags(ids, words)[at_N]] = NOTHING
        return ids, at_N

    def _tokenized(self, text: str) -> tuple[list[int], list[int | None], np.ndarray]:
        """The teacher's tokens, their words, and after how many bytes of the text each ends.

        Behind a byte that its tokenizer changed, that is nowhere.
        """
        data = text.encode()
        # The space that the tokenizer adds stands for the text's own.
        ids, words = self.teacher.words(text[self.teacher.always_adds_space and text[:1] == " " :])
        joined = self.teacher.join(ids)
        ends = self.teacher.lengths[ids].cumsum() if ids else np.zeros(0, dtype=np.int64)
        if joined == data:
            return ids, words, ends
        added = int(self.teacher.adds_space and joined[:1] == b" " != data[:1])
        same = len(os.path.commonprefix([joined[added:], data]))
        ends = ends - added
        return ids, words, np.where(ends <= same, ends, len(data) + 1)


class Settled:
    """Whether a text's tokens would be the same, whatever follows it.

    Byte-level tokenizers cut a text into words by a pattern that looks ahead: of three spaces the
    last belongs to the word behind them, and to the others if there is none. The teacher's states
    up to the same byte would then tell an early layer of what is to come. So what hangs together
    without a space in between is tokenized again, ended behind each of its tokens, and must come
    out the same. What the tokenizer said is remembered.
    """

    def __init__(self, teacher: TokenBytes) -> None:
        self._teacher = teacher
        self._begins = np.array([piece[:1].isspace() for piece in teacher.bytes])
        self._open = np.array([_is_open(piece) for piece in teacher.bytes])
        self._known: dict[tuple[int, ...], list[bool]] = {}

    def flags(self, ids: list[int], words: list[int | None]) -> np.ndarray:
        """Whether tokens, each of the word of that number, are settled up to and with each."""
        if len(self._known) > REMEMBERED:
            self._known.clear()
        found = np.zeros(len(ids), dtype=bool)
        for start, end in self._parts(ids, words):
            part = tuple(ids[start : min(end, start + TOKENS)])
            if part not in self._known:
                self._known[part] = self._tried(part)
            found[start : start + len(part)] = self._known[part]
        return found

    def _parts(self, ids: list[int], words: list[int | None]) -> Iterator[tuple[int, int]]:
        """What hangs together, from its first token to behind its last."""
        number = np.array(words)
        new = np.flatnonzero(number[1:] != number[:-1]) + 1
        token = np.array(ids)
        new = new[~self._open[token[new - 1]]]
        apart = new[self._begins[token[new]]]
        bounds = [0, *apart.tolist(), len(ids)]
        for start, end in itertools.pairwise(bounds):
            if end - start <= WORDS:
                yield start, end
                continue
            inside = new[new.searchsorted(start, "right") : new.searchsorted(end)]
            cuts = [start, *inside[WORDS - 1 :: WORDS].tolist(), end]
            yield from itertools.pairwise(cuts)

    def _tried(self, part: tuple[int, ...]) -> list[bool]:
        beginnings = [part[: i + 1] for i in range(len(part))]
        texts = [self._teacher.join(ids).decode(errors="replace") for ids in beginnings]
        fast = self._teacher.tokenizer.fast
        alone = fast.encode_batch_fast(texts, add_special_tokens=False)
        # One that ends inside a character does not come out the same.
        return [tuple(row.ids) == begun for row, begun in zip(alone, beginnings, strict=True)]


def _is_open(piece: bytes) -> bool:
    """Whether what follows a token may hang together with it: white space, half a character."""
    try:
        return piece.decode()[-1:].isspace()
    except UnicodeDecodeError:
        return True


class Translated(torch.utils.data.Dataset):
    """Samples, whose `tokens` are `[S]`, with the teacher's row and the index into it.

    The teacher's rows have that `length`; what goes beyond loses its targets.
    """

    def __init__(self, dataset: Any, translator: Translator, length: int) -> None:
        self._dataset, self._translator, self._length = dataset, translator, length
        self._is_over = torch.zeros((), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self._dataset)

    def stop(self) -> None:
        """Translate nothing any more, in the workers too: nobody is guided."""
        self._is_over.fill_(True)

    def __getitem__(self, index: int | None) -> dict[str, torch.Tensor]:
        sample = self._dataset[index]
        tokens_S = sample["tokens"].numpy()
        # Of the same keys: a batch may hold samples from before and after.
        ids, index_S = np.zeros(0, dtype=np.int64), np.full(len(tokens_S), NOTHING)
        if not self._is_over:
            ids, index_S = self._translator.row(tokens_S)
        ids, index_S = cut(ids, index_S, self._length)
        own = {TEACHER_TOKENS: torch.from_numpy(ids), TEACHER_INDEX: torch.from_numpy(index_S)}
        return sample | own


def cut(ids: np.ndarray, index_S: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """A teacher's row of just this length; zeros at its end are read by nothing before them."""
    padded = np.pad(ids[:length], (0, max(length - len(ids), 0)))
    return padded, np.where(index_S < length, index_S, NOTHING)


def measure(dataset: Any, translator: Translator, length: int | None) -> tuple[int, float]:
    """The teacher's rows' length, and the share of the loss's tokens that have a target there.

    Looks at a run's first rows; a `length` of None becomes one that is enough for them.
    """
    samples = [dataset[i] for i in range(min(MEASURED_ROWS, len(dataset)))]
    rows = [translator.row(sample["tokens"].numpy()) for sample in samples]
    if length is None:
        longest = max(len(ids) for ids, _ in rows)
        length = int(-(-longest * MARGIN // MULTIPLE)) * MULTIPLE
    masks = np.stack([sample["loss_mask"].numpy() for sample in samples])
    index = np.stack([index_S for _, index_S in rows])
    has_target = (index != NOTHING) & (index < length)
    return length, float((masks * has_target).sum() / max(masks.sum(), 1))


def _not_of_the_text(data: bytes, space: bool) -> int:
    """Bytes in front that are not the text's: an added space, or the end of a cut character."""
    if space:
        return int(data[:1] == b" ")
    head = data[:3]
    return len(head) - len(head.lstrip(bytes(range(0x80, 0xC0))))


def _decoded(data: bytes) -> str:
    """As far as it is text: the last character may be cut."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()
