"""Whether a text's tokens would be the same, whatever follows it.

What BPE or a unigram model makes of a word up to a cut does not depend on what follows the cut. But
byte-level tokenizers cut a text into words by a pattern that looks ahead: of three spaces the last
belongs to the word behind them, and to the others if there is none. Two texts that begin alike may
then be read in other tokens up to the same byte, and the teacher's states there differ: an early
layer would be told of what is to come. So what hangs together without a space in between is
tokenized again, ended behind each of its tokens, and must come out the same up to there.
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
        spans = list(self._parts(ids, words))
        parts = [tuple(ids[start : min(end, start + TOKENS)]) for start, end in spans]
        self._learn({part for part in parts if part not in self._known})
        found = np.zeros(len(ids), dtype=bool)
        for (start, _), part in zip(spans, parts, strict=True):
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

    def _learn(self, parts: set[tuple[int, ...]]) -> None:
        beginnings = [part[:i] for part in sorted(parts) for i in range(1, len(part) + 1)]
        texts = [self._teacher.join(ids).decode(errors="replace") for ids in beginnings]
        alone = self._teacher.encode_many(texts)
        # One that ends inside a character does not come out the same.
        same = iter([tuple(a) == b for a, b in zip(alone, beginnings, strict=True)])
        for part in sorted(parts):
            self._known[part] = [next(same) for _ in part]


def _is_open(piece: bytes) -> bool:
    """Whether what follows a token may hang together with it: white space, half a character."""
    try:
        return piece.decode()[-1:].isspace()
    except UnicodeDecodeError:
        return True
