"""Megatron's tokenizers, as its own flags describe them, for preprocessing."""

from argparse import Namespace
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.core.tokenizers.text.text_tokenizer import MegatronTokenizerText

TOKENIZER_TYPES = (
    "HuggingFaceTokenizer",
    "GPT2BPETokenizer",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "TikTokenizer",
)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer; the fields are named after Megatron's flags."""

    tokenizer_type: str = TOKENIZER_TYPES[0]
    tokenizer_model: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    vocab_size: int | None = None
    special_tokens: tuple[str, ...] | None = None
    tokenizer_hf_no_use_fast: bool = False
    tokenizer_hf_no_include_special_tokens: bool = False
    tokenizer_sentencepiece_legacy: bool = False
    tiktoken_pattern: str | None = None
    tiktoken_num_special_tokens: int = 1000
    trust_remote_code: bool = False


def load_tokenizer(config: TokenizerConfig) -> "MegatronTokenizerText":
    """The tokenizer that Megatron builds from these flags.

    Raises:
        ValueError: it cannot be loaded.
    """
    _check(config)
    # Imported here because it takes seconds, which a mistyped argument should not cost.
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    flags = Namespace(
        **{field.name: getattr(config, field.name) for field in fields(TokenizerConfig)}
    )
    flags.special_tokens = list(config.special_tokens or ()) or None
    flags.tokenizer_sentencepiece_ignore_extra_whitespaces = True
    flags.chat_template = flags.metadata_path = None
    flags.pad_vocab_size = False
    try:
        return build_tokenizer(flags)
    except Exception as error:  # each library has its own kinds
        name = config.tokenizer_model or config.vocab_file
        raise ValueError(f"the tokenizer {name} cannot be loaded: {error}") from error


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


def end_of_document(tokenizer: "MegatronTokenizerText", name: str) -> int:
    """Id of the end-of-document token.

    Raises:
        ValueError: the tokenizer has none.
    """
    try:
        eod = tokenizer.eod
    except (AttributeError, KeyError, TypeError, ValueError):
        eod = None
    if eod is None or eod < 0:  # SentencePiece says -1
        raise ValueError(
            f"--append-eod needs an end-of-document token, but the tokenizer {name} has no "
            "eos_token; set one in its tokenizer_config.json"
        )
    return int(eod)


def token_ids(tokenizer: "MegatronTokenizerText") -> dict[str, int]:
    """Every token's id: what `tokenizer_fingerprint` identifies a tokenizer by."""
    if tokenizer.library in ("huggingface", "megatron"):
        return tokenizer._tokenizer.tokenizer.get_vocab()
    return {str(token): index for index, token in enumerate(tokenizer.vocab)}
