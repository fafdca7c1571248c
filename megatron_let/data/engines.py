"""Two ways to tokenize many texts at once: the tokenizer's own library, and gigatoken.

Both give what Megatron's `tokenize` gives for one text at a time. gigatoken is young, so what it
gives is compared with the library's while it runs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orjson
import psutil

from megatron_let.data.characters import UNICODE_FORMS, Encode, Screen, revealing
from megatron_let.data.cuts import is_proven
from megatron_let.data.tokenizer import Tokenizer
from megatron_let.errors import first_line

ENGINES = ("auto", "gigatoken", "tokenizers")
"""`tokenizers` stands for the tokenizer's own library; `auto` tries gigatoken and falls back."""

_CACHE_GROWTH_BYTES = 128 * 1024**2
"""What gigatoken's table of words seen may take before it starts anew."""
_UNWATCHED_CHARACTERS = 4 * 1024**2
"""Between two looks at the memory, which take a quarter of a millisecond."""
_UNPROVEN_OF_MODEL = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
_PROVEN_NORMALIZERS = {"Prepend", "Replace"}
"""Which gigatoken does by itself, besides the Unicode forms, which it is not let do."""


Rows = list[np.ndarray]
"""The token ids of each text, integers."""


class Unsuited(ValueError):
    """An engine cannot stand in for this tokenizer."""


class Library:
    """The library that the tokenizer comes from, many texts a call where it can."""

    name = "tokenizers"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> Rows:
        """Tokens of all texts, in order."""
        fast, special = self._tokenizer.fast, self._tokenizer.include_special_tokens
        if fast is None:
            rows = [self._tokenizer.tokenize(text) for text in texts]
        else:
            found = fast.encode_batch_fast(list(texts), add_special_tokens=special)
            rows = [row.ids for row in found]
        return [np.fromiter(row, np.uint32, len(row)) for row in rows]


class Gigatoken:
    """gigatoken, on one thread; `Unsuited` where it is not installed or not for this tokenizer.

    Its Unicode tables are newer than those of the tokenizer's own library. The library's normalizer
    is used therefore, and texts with a character that gigatoken cuts differently go to the library.
    """

    name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.fast is None:
            # A SentencePiece model it would take, but then reads "</s>" in a text as the end token
            # and normalizes U+0085 and some combined letters differently.
            raise Unsuited("gigatoken does not take this kind of tokenizer")
        if tokenizer.fast.encode_special_tokens:  # which its own description does not tell
            raise Unsuited("gigatoken is not used with split_special_tokens")
        source = orjson.loads(tokenizer.fast.to_str())
        _check_features(source)
        normalizer = _take_out_unicode_form(source, tokenizer.fast)
        self._source = orjson.dumps(source)
        self._tokenizer = _gigatoken(self._source)
        self.reference = Library(tokenizer)
        self._prefix, self._suffix = added_around(tokenizer)
        self._memory_at_start = self._unwatched = 0
        added = [token["content"] for token in source["added_tokens"]]
        self._screen = Screen(*_compared(revealing(source)), normalizer, added)

    def encode(self, texts: Sequence[str]) -> Rows:
        """Tokens of all texts, in order."""
        self._bound_memory(sum(map(len, texts)))
        admitted = list(map(self._screen.admit, texts))
        left_out = [text for text, seen in zip(texts, admitted, strict=True) if seen is None]
        others = iter(self.reference.encode(left_out))
        # Many texts a call would come back in a library's arrays that take long to import.
        return [
            next(others) if text is None else self._around(self._tokenizer.encode(text))
            for text in admitted
        ]

    def _around(self, ids: np.ndarray) -> np.ndarray:
        if not (self._prefix or self._suffix):
            return ids
        return np.concatenate([self._prefix, ids, self._suffix], dtype=np.uint32, casting="unsafe")

    def _bound_memory(self, characters: int) -> None:
        """Start anew before the table of words seen, which forgets none, takes too much memory."""
        self._unwatched += characters
        if self._memory_at_start and self._unwatched < _UNWATCHED_CHARACTERS:
            return
        self._unwatched = 0
        now = psutil.Process().memory_info().rss
        self._memory_at_start = self._memory_at_start or now
        if now - self._memory_at_start > _CACHE_GROWTH_BYTES:
            del self._tokenizer
            self._tokenizer = _gigatoken(self._source)
            self._memory_at_start = psutil.Process().memory_info().rss


Engine = Library | Gigatoken
"""Tokenizes texts, with what the tokenizer itself adds around each."""


def _check_features(source: dict[str, Any]) -> None:
    """Raise Unsuited for what a tokenizer.json says and gigatoken does not do.

    Each was found by `benchmarks/tokenizer_fuzz.py`, or never tried.
    """
    for name in _UNPROVEN_OF_MODEL:
        if source["model"].get(name):
            raise Unsuited(f"gigatoken is not used with a model's {name}")
    if not is_proven(source):
        raise Unsuited(
            "gigatoken does not take this tokenizer: it was not proven to cut texts as the "
            f"pre-tokenizer does: {orjson.dumps(source['pre_tokenizer']).decode():.80}"
        )
    for token in source["added_tokens"]:
        if token["single_word"]:
            raise Unsuited(f"gigatoken finds the added token {token['content']!r} inside words")


def _take_out_unicode_form(source: dict[str, Any], backend: Any) -> Any:
    """Leave a Unicode normalizer out, and return it; None without one, Unsuited if not proven."""
    outer = source["normalizer"] or {"normalizers": []}
    kinds = {part["type"] for part in outer.get("normalizers", [outer])}
    if kinds <= _PROVEN_NORMALIZERS:
        return None
    if not kinds <= UNICODE_FORMS:
        raise Unsuited(f"gigatoken is not used with the normalizer {' + '.join(sorted(kinds))}")
    for token in (token["content"] for token in source["added_tokens"]):
        if backend.normalizer.normalize_str(token) != token:
            raise Unsuited(f"the added token {token!r} is not normalized")
    source["normalizer"] = None
    return backend.normalizer


def _gigatoken(source: str | bytes) -> Any:
    try:
        import gigatoken

        return gigatoken.Tokenizer.from_json(source)
    except ImportError as error:
        raise Unsuited("gigatoken is not installed (pip install gigatoken)") from error
    except Exception as error:  # its binding raises several kinds
        raise Unsuited(f"gigatoken does not take this tokenizer: {error}") from error


def _compared(source: str) -> tuple[Encode, Encode]:
    """What gigatoken and the library make of texts by a tokenizer.json."""
    from tokenizers import Tokenizer

    ours, library = _gigatoken(source), Tokenizer.from_str(source)
    return (
        lambda texts: [ours.encode(text).tolist() for text in texts],
        lambda texts: [r.ids for r in library.encode_batch_fast(texts, add_special_tokens=False)],
    )


def added_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and behind a text, such as BOS."""
    if not tokenizer.include_special_tokens:
        return [], []
    bare, wrapped = (
        tokenizer.fast.encode("a", add_special_tokens=special).ids for special in (False, True)
    )
    for start in range(len(wrapped) - len(bare) + 1):
        if wrapped[start : start + len(bare)] == bare:
            return wrapped[:start], wrapped[start + len(bare) :]
    raise Unsuited("what this tokenizer adds to a text does not stand around it")


def make_engine(name: str, tokenizer: Tokenizer, tell: Callable[[str], None]) -> Engine:
    """The engine of that name; `tell` is told why `auto` fell back, else it raises Unsuited."""
    if name != "tokenizers":
        try:
            return Gigatoken(tokenizer)
        except Unsuited as error:
            if name == "gigatoken":
                raise
            reason = first_line(error)
            tell(f"{reason}: tokenizing with the tokenizer's own library")
    return Library(tokenizer)
