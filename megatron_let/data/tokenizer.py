"""Megatron's tokenizers, as its own flags describe them, for preprocessing.

They are written anew, since Megatron's cannot be imported without all of Megatron, which takes five
times as long as preprocessing 100 MB. `tests/unit/data/test_tokenizer.py` compares the two.
"""

import hashlib
import importlib.util
import itertools
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from types import ModuleType
from typing import Any

from megatron_let.hugging_face import check_vocabulary, remote_code

TOKENIZER_TYPES = (
    "HuggingFaceTokenizer GPT2BPETokenizer SentencePieceTokenizer GPTSentencePieceTokenizer "
    "Llama2Tokenizer"
).split()

_STAND_INS = {
    "sep_token": "eos_token",
    "eos_token": "sep_token",
    "cls_token": "bos_token",
    "bos_token": "cls_token",
}
"""What Megatron takes for a special token that a tokenizer has not."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer; the fields are named after Megatron's flags."""

    tokenizer_type: str = TOKENIZER_TYPES[0]
    tokenizer_model: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    special_tokens: tuple[str, ...] | None = None
    tokenizer_hf_no_use_fast: bool = False
    tokenizer_hf_no_include_special_tokens: bool = False
    tokenizer_sentencepiece_legacy: bool = False
    trust_remote_code: bool = False


class HuggingFace:
    """A `PreTrainedTokenizerBase`, as Megatron's `HuggingFaceTokenizer` sets it up.

    With `include_special_tokens`, `tokenize` adds what it puts around a text itself, such as BOS.
    """

    def __init__(
        self, tokenizer: Any, special_tokens: Sequence[str], include_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self.include_special_tokens = include_special_tokens
        found = {
            name: getattr(tokenizer, other)
            for name, other in _STAND_INS.items()
            if getattr(tokenizer, name) is None and getattr(tokenizer, other)
        }
        found["additional_special_tokens"] = list(special_tokens)
        tokenizer.add_special_tokens(found)
        self.fast: Any = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        """The compiled tokenizer of the tokenizers library, where there is one."""
        if self.fast is not None:  # of what a folder says
            self.fast.no_truncation()
            self.fast.no_padding()
        self.vocab_size = len(tokenizer)
        self.eod: int | None = tokenizer.eos_token_id
        """Id of the end-of-document token; None without one."""

    def ids(self) -> dict[str, int]:
        """Every token's id: what `tokenizer_fingerprint` identifies a tokenizer by."""
        return self._tokenizer.get_vocab()

    def specials(self) -> set[int]:
        """Ids of tokens that stand for no text."""
        return set(self._tokenizer.all_special_ids)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text."""
        if self.include_special_tokens:
            return self._tokenizer(text).input_ids
        return self._tokenizer.convert_tokens_to_ids(self._tokenizer.tokenize(text))

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self._tokenizer.convert_tokens_to_string(self._tokenizer.convert_ids_to_tokens(ids))


class SentencePiece:
    """A SentencePiece model, as Megatron's `SentencePieceTokenizer` reads texts with it.

    With `legacy`, Megatron's older ways, `special_tokens` are looked for in a text before the model
    reads what lies between, and are given new ids unless the model has them.
    """

    fast: Any = None
    include_special_tokens = True

    def __init__(self, path: str, special_tokens: Sequence[str], legacy: bool) -> None:
        import sentencepiece

        if special_tokens and not legacy:
            raise ValueError(
                "--tokenizer-special-tokens needs --tokenizer-sentencepiece-legacy; other "
                "SentencePiece models have theirs from their training"
            )
        self._model = sentencepiece.SentencePieceProcessor(model_file=path)
        self._space = self._model.piece_to_id("\u2581")
        self.eod = None if legacy or self._model.eos_id() < 0 else self._model.eos_id()
        self.vocab_size = self._model.get_piece_size()
        self._special: dict[str, int] = {}
        for token in dict.fromkeys(special_tokens):
            self._special[token] = self._model.piece_to_id(token)
            if self._special[token] == self._model.unk_id():
                self._special[token] = self.vocab_size
                self.vocab_size += 1
        self._between = re.compile("|".join(map(re.escape, self._special)) or r"(?!)")

    def ids(self) -> dict[str, int]:  # noqa: D102
        pieces = map(self._model.id_to_piece, range(self._model.get_piece_size()))
        return {piece: index for index, piece in enumerate(pieces)} | self._special

    def specials(self) -> set[int]:  # noqa: D102
        every = range(self._model.get_piece_size())
        own = {i for i in every if self._model.is_control(i) or self._model.is_unknown(i)}
        return own | set(self._special.values())

    def tokenize(self, text: str) -> list[int]:  # noqa: D102
        ids: list[int] = []
        start = 0
        for match in self._between.finditer(text):
            before = self._model.encode_as_ids(text[start : match.start()])
            # A space behind a special token belongs to it, but for the last one's.
            if start and before[:1] == [self._space]:
                del before[0]
            ids += [*before, self._special[match[0]]]
            start = match.end()
        return ids + self._model.encode_as_ids(text[start:])

    def detokenize(self, ids: Sequence[int]) -> str:  # noqa: D102
        names = {index: f" {token} " for token, index in self._special.items()}
        decode, runs = self._model.decode_ids, itertools.groupby(ids, names.get)
        return "".join(name * len([*run]) if name else decode([*run]) for name, run in runs)


Tokenizer = HuggingFace | SentencePiece
"""What preprocessing asks of a tokenizer; the names of its methods are Megatron's."""


def tokenizer_fingerprint(token_to_id: dict[str, int]) -> str:
    """Return the SHA-256 (64 hex digits) of a tokenizer's complete token -> id map.

    It is the same exactly for tokenizers that give every token the same id, whatever their maps'
    order, or the size of a padded embedding. Hugging Face's map is `tokenizer.get_vocab()`.
    """
    # ASCII escapes keep the text well defined even for tokens that are not valid Unicode.
    canonical = json.dumps(sorted(token_to_id.items()), ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def load_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that these flags describe; ValueError if it cannot be loaded."""
    _check(config)
    special = config.special_tokens or ()
    try:
        if "HuggingFace" not in config.tokenizer_type and config.tokenizer_model:
            legacy = config.tokenizer_sentencepiece_legacy
            return SentencePiece(config.tokenizer_model, special, legacy)
        include = not config.tokenizer_hf_no_include_special_tokens
        return HuggingFace(_from_transformers(config), special, include)
    except Exception as error:  # each library has its own kinds
        name = config.tokenizer_model or config.vocab_file
        if "trust_remote_code" in str(error):
            raise remote_code(name, "; or add --trust-remote-code") from error
        raise ValueError(f"the tokenizer {name} cannot be loaded: {error}") from error


def _from_transformers(config: TokenizerConfig) -> Any:
    if "GPT2" in config.tokenizer_type:  # of its two files alone: Megatron's also asks the hub
        from transformers.models.gpt2.tokenization_gpt2 import GPT2Tokenizer

        return GPT2Tokenizer(config.vocab_file, config.merge_file)
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    files = {"vocab_file": config.vocab_file, "merges_file": config.merge_file}
    found = AutoTokenizer.from_pretrained(
        config.tokenizer_model,
        use_fast=not config.tokenizer_hf_no_use_fast,
        trust_remote_code=config.trust_remote_code,
        **{name: file for name, file in files.items() if file and config.vocab_file},
    )
    return check_vocabulary(found)


def _check(config: TokenizerConfig) -> None:
    kind = config.tokenizer_type
    if kind not in TOKENIZER_TYPES:
        raise ValueError(
            f"--tokenizer-type {kind} is not supported; use one of {', '.join(TOKENIZER_TYPES)}"
        )
    if kind == "GPT2BPETokenizer":
        if not (config.vocab_file and config.merge_file):
            raise ValueError(f"--tokenizer-type {kind} needs --vocab-file and --merge-file")
    elif not config.tokenizer_model:
        raise ValueError(f"--tokenizer-type {kind} needs --tokenizer-model")


_PACKAGES = ("transformers", "transformers.models")
"""They read the sources of all 1,700 model files to learn what names they define."""


class _Deferred(ModuleType):
    """A package whose own code runs when somebody asks for a name that is no module of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self.__spec__ is None or self.__spec__.loader is None:
            raise AttributeError(name)
        self.__class__ = ModuleType  # type: ignore[assignment]
        self.__spec__.loader.exec_module(self)
        # transformers puts another object in its place, which must serve who holds this one.
        loaded = sys.modules[self.__name__]
        self.__dict__["__getattr__"] = lambda name: getattr(loaded, name)
        return getattr(loaded, name)


def without_models() -> None:
    """Make the first import of transformers take a third of the time, and none of torch.

    Only for a process that tokenizes and ends: it can import neither torch nor a model afterwards.
    """
    if "transformers" in sys.modules or "torch" in sys.modules:
        return
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    sys.modules["torch"] = None  # type: ignore[assignment]  # how Python forbids an import
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None, "transformers is a requirement"
        package = importlib.util.module_from_spec(spec)
        package.__class__ = _Deferred
        sys.modules[name] = package
    transformers, models = (sys.modules[name] for name in _PACKAGES)
    transformers.__dict__.update(__version__=version("transformers"), models=models)
