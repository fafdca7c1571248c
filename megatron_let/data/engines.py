"""Two ways to tokenize many texts at once: the tokenizer's own library, and gigatoken.

Both give what Megatron's `tokenize` gives for one text at a time. The library does by definition
(`tests/unit/data/test_engines.py` compares them); gigatoken is young, so what it gives is compared
while it runs.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from megatron_let.data.characters import UNICODE_FORMS, Encode, Normalizer, Screen, revealing
from megatron_let.data.tokenizer import hugging_face

if TYPE_CHECKING:
    from megatron.core.tokenizers.text.text_tokenizer import MegatronTokenizerText

ENGINES = ("auto", "gigatoken", "tokenizers")
"""`tokenizers` stands for the tokenizer's own library; `auto` tries gigatoken and falls back."""

_CACHE_GROWTH_BYTES = 128 * 1024**2
"""What gigatoken's table of words seen may take before it starts anew."""
_PROVEN_NORMALIZERS = {"Prepend", "Replace"}
"""Which gigatoken does by itself, besides the Unicode forms, which it is not let do."""


@dataclass(frozen=True)
class Tokens:
    """The token ids of several texts, one behind the other."""

    ids: np.ndarray
    """`[sum of lengths]`, integers."""
    lengths: np.ndarray
    """`[texts]`, int64."""

    def rows(self) -> list[np.ndarray]:
        """Ids of each text."""
        return np.split(self.ids, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []


class Engine(Protocol):
    """Tokenizes texts, with what the tokenizer itself adds around each."""

    name: str

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Tokens of all texts, in order."""
        ...


class Unsuited(ValueError):
    """An engine cannot stand in for this tokenizer."""


class Library:
    """The library that the tokenizer comes from, many texts a call where it can."""

    name = "tokenizers"

    def __init__(self, tokenizer: "MegatronTokenizerText") -> None:
        self._encode = _library_batch(tokenizer)

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Tokens of all texts, in order."""
        return _flat(self._encode(list(texts)))


def _flat(rows: Sequence[Sequence[int]]) -> Tokens:
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    total = int(lengths.sum())
    return Tokens(np.fromiter(chain.from_iterable(rows), np.uint32, total), lengths)


def _library_batch(
    tokenizer: "MegatronTokenizerText",
) -> Callable[[list[str]], Sequence[Sequence[int]]]:
    backend = _fast_backend(tokenizer)
    if backend is None:
        return lambda texts: [tokenizer.tokenize(text) for text in texts]
    special = tokenizer._tokenizer.include_special_tokens
    backend.no_truncation()
    backend.no_padding()
    encode = backend.encode_batch_fast
    return lambda texts: [row.ids for row in encode(texts, add_special_tokens=special)]


def _fast_backend(tokenizer: "MegatronTokenizerText") -> Any:
    """Hugging Face's compiled tokenizer behind Megatron's wrapper, or None."""
    inner = hugging_face(tokenizer)
    return inner.backend_tokenizer if inner is not None and inner.is_fast else None


class Gigatoken:
    """gigatoken, on one thread: preprocessing spreads over processes.

    Its Unicode tables are newer than those of the tokenizer's own library. The library's normalizer
    is used therefore, and texts with a character that gigatoken cuts differently go to the library.

    Raises:
        Unsuited: it is not installed, or does not know this kind of tokenizer.
    """

    name = "gigatoken"

    def __init__(self, tokenizer: "MegatronTokenizerText") -> None:
        source, normalizer = _without_unicode_form(tokenizer)
        self._load = _gigatoken_loader(source)
        self._own_library = Library(tokenizer)
        self._prefix, self._suffix = _added_around(tokenizer)
        try:
            self._tokenizer = self._load()
        except Exception as error:  # its binding raises several kinds
            raise Unsuited(f"gigatoken does not take this tokenizer: {error}") from error
        self._memory_at_start: int | None = None
        added = [token["content"] for token in json.loads(source)["added_tokens"]]
        self._screen = Screen(*_to_compare(revealing(source)), normalizer, added)

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Tokens of all texts, in order."""
        admitted = list(map(self._screen.admit, texts))
        others = [index for index, text in enumerate(admitted) if text is None]
        tokens = self._encode([text or "" for text in admitted])
        if not others:
            return tokens
        return _replaced(tokens, others, self._own_library.encode([texts[i] for i in others]))

    def _encode(self, texts: Sequence[str]) -> Tokens:
        self._bound_memory()
        rows = self._tokenizer.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(rows.offsets.data)
        ids = np.asarray(rows.content.data)[offsets[0] : offsets[-1]]
        tokens = Tokens(ids, np.diff(offsets).astype(np.int64))
        if not (self._prefix or self._suffix):
            return tokens
        return _around(tokens, self._prefix, self._suffix, np.ones(len(texts), bool))

    def _bound_memory(self) -> None:
        """Start anew before the table of words seen has taken too much memory.

        It never forgets a word, and text such as hashes or logs never runs out of new ones.
        """
        now = _resident_bytes()
        self._memory_at_start = self._memory_at_start or now
        if now - self._memory_at_start > _CACHE_GROWTH_BYTES:
            del self._tokenizer
            self._tokenizer = self._load()
            self._memory_at_start = _resident_bytes()


def _without_unicode_form(tokenizer: "MegatronTokenizerText") -> tuple[str, Normalizer | None]:
    """The tokenizer.json without its Unicode normalizer, and that one.

    Raises:
        Unsuited: the tokenizer is none of Hugging Face's, or what it does to a text before cutting
            it was not proven to be the same in gigatoken.
    """
    backend = _fast_backend(tokenizer)
    if backend is None:
        # A SentencePiece model it would take, but then reads "</s>" in a text as the end token and
        # normalizes U+0085 and some combined letters differently.
        raise Unsuited(f"gigatoken does not take this kind of tokenizer: {tokenizer.path}")
    source = json.loads(backend.to_str())
    kinds = set(_normalizer_kinds(source["normalizer"]))
    if kinds and kinds <= UNICODE_FORMS:
        normalizer, source["normalizer"] = backend.normalizer, None
        for token in (token["content"] for token in source["added_tokens"]):
            if normalizer.normalize_str(token) != token:
                raise Unsuited(f"the added token {token!r} is not normalized")
        return json.dumps(source), normalizer
    if kinds <= _PROVEN_NORMALIZERS:
        return backend.to_str(), None
    raise Unsuited(f"gigatoken is not used with the normalizer {' + '.join(sorted(kinds))}")


def _normalizer_kinds(normalizer: dict[str, Any] | None) -> list[str]:
    if normalizer is None:
        return []
    if normalizer["type"] == "Sequence":
        return [kind for part in normalizer["normalizers"] for kind in _normalizer_kinds(part)]
    return [normalizer["type"]]


def _gigatoken_loader(source: str) -> Callable[[], Any]:
    try:
        import gigatoken
    except ImportError as error:
        raise Unsuited("gigatoken is not installed (pip install gigatoken)") from error
    return partial(gigatoken.Tokenizer.from_json, source)


def _to_compare(source: str) -> tuple[Encode, Encode]:
    """What gigatoken and the library make of texts by the tokenizer.json `source`."""
    import gigatoken
    from tokenizers import Tokenizer

    ours, library = gigatoken.Tokenizer.from_json(source), Tokenizer.from_str(source)
    return (
        lambda texts: ours.encode_batch_list(texts, parallel=False),
        lambda texts: [r.ids for r in library.encode_batch_fast(texts, add_special_tokens=False)],
    )


def _added_around(tokenizer: "MegatronTokenizerText") -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and behind a text, such as BOS."""
    backend = _fast_backend(tokenizer)
    if backend is None or not tokenizer._tokenizer.include_special_tokens:
        return [], []
    bare = backend.encode("a", add_special_tokens=False).ids
    wrapped = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(wrapped) - len(bare) + 1):
        if wrapped[start : start + len(bare)] == bare:
            return wrapped[:start], wrapped[start + len(bare) :]
    raise Unsuited("gigatoken cannot add what this tokenizer adds to a text")


def with_end(tokens: Tokens, eod: int | None, dtype: type[np.number]) -> Tokens:
    """The tokens in `dtype`, with `eod` behind every text that is not empty."""
    if eod is None:
        return Tokens(tokens.ids.astype(dtype), tokens.lengths)
    return _around(Tokens(tokens.ids.astype(dtype), tokens.lengths), [], [eod], tokens.lengths > 0)


def _around(tokens: Tokens, prefix: list[int], suffix: list[int], where: np.ndarray) -> Tokens:
    """The tokens with a prefix and a suffix around every text of the mask `where`."""
    lengths = tokens.lengths + where * (len(prefix) + len(suffix))
    ends = np.cumsum(lengths)
    ids = np.empty(int(lengths.sum()), tokens.ids.dtype)
    is_text = np.ones(len(ids), bool)
    firsts, lasts = (ends - lengths)[where], (ends - len(suffix))[where]
    for places, added in ((firsts, prefix), (lasts, suffix)):
        for offset, token in enumerate(added):
            ids[places + offset] = token
            is_text[places + offset] = False
    ids[is_text] = tokens.ids
    return Tokens(ids, lengths)


def _replaced(tokens: Tokens, places: list[int], others: Tokens) -> Tokens:
    """The tokens with those of the texts at `places` taken from `others`."""
    rows, lengths = tokens.rows(), tokens.lengths.copy()
    for place, row in zip(places, others.rows(), strict=True):
        rows[place] = row
    lengths[places] = others.lengths
    return Tokens(np.concatenate(rows), lengths)


def _resident_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def make_engine(
    name: str, tokenizer: "MegatronTokenizerText", tell: Callable[[str], None]
) -> Engine:
    """The engine of that name, one of `ENGINES`; `tell` gets to know why `auto` fell back.

    Raises:
        Unsuited: gigatoken was asked for by name and cannot do it.
    """
    if name == "tokenizers":
        return Library(tokenizer)
    try:
        return Gigatoken(tokenizer)
    except Unsuited as error:
        if name == "gigatoken":
            raise
        tell(f"{error}: tokenizing with the tokenizer's own library")
        return Library(tokenizer)
