"""Which texts two tokenizer libraries would take differently: their Unicode tables differ in age.

A pre-tokenizer cuts a text at kinds of characters: one that Unicode got last year is a letter to
one library, nothing to another. A normalizer puts marks in order and joins them with the letter
before. What a character does is found out when it first occurs.
"""

import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Encode = Callable[[list[str]], Sequence[Sequence[int]]]
"""Token ids of each text."""

UNICODE_FORMS = frozenset({"NFC", "NFD", "NFKC", "NFKD"})
"""Normalizers that leave ASCII alone, and every part of a text that is in their form."""

_KNOWN, _CUT_DIFFERENTLY, _ACTIVE = 1, 2, 4
_LAST_DECOMPOSED = 0x2FA20
"""Behind this one no character is made of others."""
_LOWEST_MARK, _HIGHEST_MARK = "\u0334", "\u0345"
"""Of all classes of marks the first and the last in order."""
_CONTEXT = "a{0}1{0},{0}'{0}a\n"


def revealing(tokenizer: dict[str, Any]) -> str:
    """A tokenizer.json whose tokens show every cut beside a character.

    Of a byte-level one its vocabulary is replaced: the merges join an ASCII character of `_CONTEXT`
    with the first or last byte of its neighbour. Others do not cut by kinds of characters, and stay
    as they are.
    """
    if "ByteLevel" not in json.dumps(tokenizer["pre_tokenizer"]):
        return json.dumps(tokenizer)
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    kinds = b"a1,'", range(0xC2, 0xF5), range(0x80, 0xC0)
    ascii_ones, first, last = ([letters[byte] for byte in kind] for kind in kinds)
    merges = [*itertools.product(ascii_ones, first), *itertools.product(last, ascii_ones)]
    tokens = [*letters.values(), *(one + other for one, other in merges)]
    model = tokenizer["model"] | {"vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges}
    return json.dumps(tokenizer | {"model": model, "added_tokens": [], "post_processor": None})


class Screen:
    """Decides what of each text the fast engine may see, at some hundred megabytes a second.

    `ours` and `theirs` are the fast engine and the library, with the same `revealing` tokenizer;
    `normalizer` the library's, of `UNICODE_FORMS`, which the fast engine is to do without, or None;
    `added_tokens` what both look for in a text before they normalize what lies between.
    """

    def __init__(
        self, ours: Encode, theirs: Encode, normalizer: Any, added_tokens: Sequence[str]
    ) -> None:
        self._ours, self._theirs = ours, theirs
        self._normalized = str if normalizer is None else normalizer.normalize_str
        self._joined = set() if normalizer is None else _joined_to_others()
        self._added = re.compile("|".join(map(re.escape, added_tokens)) or r"(?!)")
        self._traits = np.zeros(0x110000, np.uint8)
        self._traits[:0x80] = _KNOWN

    def admit(self, text: str) -> str | None:
        """The text for the fast engine, normalized; None if only the library takes it right."""
        if text.isascii():
            return text
        traits = self._traits_of(text)
        if (traits & _ACTIVE).any() and not self._is_normalized(text):
            normalized = self._normalized(text)
            # An added token could be torn apart, or arise.
            if self._added.search(text) or self._added.search(normalized):
                return None
            text, traits = normalized, self._traits_of(normalized)
        return None if (traits & _CUT_DIFFERENTLY).any() else text

    def _is_normalized(self, text: str) -> bool:
        """Whether a text is in its form; of characters that are not active each part is."""
        points = np.frombuffer(text.encode("utf-32-le"), "<u4")
        active = self._traits[points] & _ACTIVE != 0
        with_the_one_before = active.copy()
        with_the_one_before[:-1] |= active[1:]
        part = points[with_the_one_before].tobytes().decode("utf-32-le")
        return self._normalized(part) == part

    def _traits_of(self, text: str) -> np.ndarray:
        """Those of its characters that are not ASCII."""
        units = np.frombuffer(text.encode(), np.uint8)
        others = units[units >= 0x80].tobytes().decode()
        points = np.frombuffer(others.encode("utf-32-le"), "<u4")
        traits = self._traits[points]
        if not traits.all():
            self._learn(np.unique(points[traits == 0]))
            traits = self._traits[points]
        return traits

    def _learn(self, points: np.ndarray) -> None:
        characters = list(map(chr, points.tolist()))
        texts = list(map(_CONTEXT.format, characters))
        found = zip(points, characters, self._ours(texts), self._theirs(texts), strict=True)
        for point, character, ours, theirs in found:
            differs = list(ours) != list(theirs)
            traits = _KNOWN | _CUT_DIFFERENTLY * differs | _ACTIVE * self._is_active(character)
            self._traits[point] = traits

    def _is_active(self, character: str) -> bool:
        """Whether the normalizer may change it, move it, or join it with one before it."""
        among_marks = f"\n{_HIGHEST_MARK}{character}\n{character}{_LOWEST_MARK}"
        return character in self._joined or self._normalized(among_marks) != among_marks


def _joined_to_others() -> set[str]:
    """Characters that can make one character together with one before them.

    They, or the first of their parts, stand behind another in the parts of some character.
    """
    from tokenizers import normalizers

    points = (p for p in range(0x80, _LAST_DECOMPOSED) if not 0xD800 <= p < 0xE000)
    characters = [chr(point) for point in points]
    parts = normalizers.NFD().normalize_str("\n".join(characters)).split("\n")
    made = {whole: part for whole, part in zip(characters, parts, strict=True) if whole != part}
    behind = {character for part in made.values() for character in part[1:]}
    return behind | {whole for whole, part in made.items() if part[0] in behind}
