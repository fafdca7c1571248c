"""Whether a text's tokens would be the same, whatever follows it.

Byte-level tokenizers cut a text into words by a pattern that looks ahead: of three spaces the last
belongs to the word behind them, and to the others if there is none. The teacher's states up to the
same byte would then tell an early layer of what is to come. So what hangs together without a space
in between is tokenized again, ended behind each of its tokens, and must come out the same.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from megatron_let.translation.token_bytes import TokenBytes

WORDS = 16
"""So many at most hang together: a text without spaces would for ever."""
TOKENS = 64
"""Of such a piece so many are tried; of what comes behind them nothing is known."""
REMEMBERED = 1 << 17
"""Pieces of text, most of which come again."""


class Settled:
    """Asks a teacher's tokenizer, and remembers what it said."""

    def __init__(self, teacher: TokenBytes) -> None:
        self._teacher = teacher
        self._begins = np.array([piece[:1].isspace() for piece in teacher.bytes])
        self._open = np.array([_is_open(piece) for piece in teacher.bytes])
        self._known: dict[tuple[int, ...], list[bool]] = {}

    def flags(self, ids: list[int], words: list[int | None]) -> np.ndarray:
        """Whether a text's tokens are settled up to and with each of them `[tokens]`.

        `words` has the number of the word that each belongs to.
        """
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
        alone = self._teacher.encode_many(texts)
        # One that ends inside a character does not come out the same.
        return [tuple(ids) == begun for ids, begun in zip(alone, beginnings, strict=True)]


def _is_open(piece: bytes) -> bool:
    """Whether what follows a token may hang together with it: white space, half a character."""
    try:
        return piece.decode()[-1:].isspace()
    except UnicodeDecodeError:
        return True
