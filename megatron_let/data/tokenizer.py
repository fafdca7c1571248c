"""Megatron's tokenizers, as its own flags describe them, for preprocessing.

They are written anew, since Megatron's cannot be imported without all of Megatron, which takes five
times as long as preprocessing 100 MB. `tests/unit/data/test_tokenizer.py` compares the two.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_let.hugging_face import remote_code

TOKENIZER_TYPES = (
    "HuggingFaceTokenizer",
    "GPT2BPETokenizer",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
)
GPT2_END_OF_DOCUMENT = "<|endoftext|>"


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
    """A tokenizer of the transformers library, as Megatron's `HuggingFaceTokenizer` sets it up.

    Args:
        tokenizer: `PreTrainedTokenizerBase`.
        special_tokens: further ones.
        include_special_tokens: whether `tokenize` adds what the tokenizer itself puts around a
            text, such as BOS.
    """

    def __init__(
        self, tokenizer: Any, special_tokens: Sequence[str], include_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self.include_special_tokens = include_special_tokens
        further = {"additional_special_tokens": list(special_tokens)}
        self._tokenizer.add_special_tokens(self._stand_ins() | further)
        self.fast: Any = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        """The compiled tokenizer of the tokenizers library, where there is one."""

    def _stand_ins(self) -> dict[str, str]:
        """The end token for an absent separator, the start token for an absent class token."""
        found = {}
        for one, other in (("sep_token", "eos_token"), ("cls_token", "bos_token")):
            here, there = getattr(self._tokenizer, one), getattr(self._tokenizer, other)
            if here is None and there:
                found[one] = there
            elif there is None and here:
                found[other] = here
        return found

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self._tokenizer)

    @property
    def eod(self) -> int | None:
        """Id of the end-of-document token."""
        end = self._tokenizer.eos_token
        return None if end is None else self._tokenizer.convert_tokens_to_ids([end])[0]

    def ids(self) -> dict[str, int]:
        """Every token's id: what `tokenizer_fingerprint` identifies a tokenizer by."""
        return self._tokenizer.get_vocab()

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

    Args:
        path: the model.
        special_tokens: looked for in a text before the model reads what lies between, and given new
            ids unless the model has them; only for a `legacy` tokenizer.
        legacy: Megatron's older ways.
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
        if not os.path.exists(path):
            raise ValueError("there is no such file")
        self._model = sentencepiece.SentencePieceProcessor()
        self._model.Load(path)
        self._legacy = legacy
        self._special: dict[str, int] = {}
        for token in special_tokens:
            known = self._model.piece_to_id(token)
            if known != self._model.unk_id():
                self._special[token] = known
            elif token not in self._special:
                self._special[token] = self.vocab_size
        self._between = re.compile("|".join(map(re.escape, self._special)) or r"(?!)")
        self._space = self._model.piece_to_id("\u2581")

    @property
    def vocab_size(self) -> int:  # noqa: D102
        size = self._model.get_piece_size()
        return size + sum(index >= size for index in self._special.values())

    @property
    def eod(self) -> int | None:  # noqa: D102
        return None if self._legacy else self._model.eos_id()

    def ids(self) -> dict[str, int]:  # noqa: D102
        pieces = map(self._model.id_to_piece, range(self._model.get_piece_size()))
        return {piece: index for index, piece in enumerate(pieces)} | self._special

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
        return self._model.decode_ids(list(ids))


Tokenizer = HuggingFace | SentencePiece
"""What preprocessing asks of a tokenizer; the names of its methods are Megatron's."""


def load_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that these flags describe.

    Raises:
        ValueError: it cannot be loaded.
    """
    _check(config)
    special = config.special_tokens or ()
    try:
        if "HuggingFace" not in config.tokenizer_type and config.tokenizer_model:
            legacy = config.tokenizer_sentencepiece_legacy
            return SentencePiece(config.tokenizer_model, special, legacy)
        made = _from_gpt2_files if "GPT2" in config.tokenizer_type else _from_hub_or_folder
        return HuggingFace(made(config), special, not config.tokenizer_hf_no_include_special_tokens)
    except Exception as error:  # each library has its own kinds
        name = config.tokenizer_model or config.vocab_file
        if "trust_remote_code" in str(error):
            raise remote_code(name, "; or add --trust-remote-code") from error
        raise ValueError(f"the tokenizer {name} cannot be loaded: {error}") from error


def _from_hub_or_folder(config: TokenizerConfig) -> Any:
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    files = {"vocab_file": config.vocab_file, "merges_file": config.merge_file}
    if config.vocab_file is None:
        files = {}
    return AutoTokenizer.from_pretrained(
        config.tokenizer_model,
        use_fast=not config.tokenizer_hf_no_use_fast,
        trust_remote_code=config.trust_remote_code,
        **{name: file for name, file in files.items() if file is not None},
    )


def _from_gpt2_files(config: TokenizerConfig) -> Any:
    """GPT-2's tokenizer from its two files alone; Megatron's also asks the hub for a `gpt2`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    files = str(config.vocab_file), str(config.merge_file)
    tokenizer = Tokenizer(models.BPE.from_file(*files))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = GPT2_END_OF_DOCUMENT
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end
    )


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


def end_of_document(tokenizer: Tokenizer, name: str) -> int:
    """Id of the end-of-document token.

    Raises:
        ValueError: the tokenizer has none.
    """
    eod = tokenizer.eod
    if eod is None or eod < 0:  # SentencePiece says -1
        raise ValueError(
            f"--append-eod needs an end-of-document token, but the tokenizer {name} has no "
            "eos_token; set one in its tokenizer_config.json"
        )
    return eod
