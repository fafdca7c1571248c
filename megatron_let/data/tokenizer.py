"""Megatron's tokenizers, as its own flags describe them, for preprocessing."""

import tempfile
from argparse import Namespace
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.core.tokenizers.text.text_tokenizer import MegatronTokenizerText

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


def load_tokenizer(config: TokenizerConfig) -> "MegatronTokenizerText":
    """The tokenizer that Megatron builds from these flags.

    Raises:
        ValueError: it cannot be loaded.
    """
    _check(config)
    build_tokenizer = _megatrons_builder()

    flags = Namespace(
        **{field.name: getattr(config, field.name) for field in fields(TokenizerConfig)}
    )
    flags.special_tokens = list(config.special_tokens or ()) or None
    flags.tokenizer_sentencepiece_ignore_extra_whitespaces = True
    flags.chat_template = flags.metadata_path = None
    flags.pad_vocab_size = False
    try:
        if config.tokenizer_type == "GPT2BPETokenizer":
            return _from_gpt2_files(flags, build_tokenizer)
        return build_tokenizer(flags)
    except Exception as error:  # each library has its own kinds
        name = config.tokenizer_model or config.vocab_file
        raise ValueError(f"the tokenizer {name} cannot be loaded: {error}") from error


def _megatrons_builder() -> Any:
    """Megatron's `build_tokenizer`, imported here since it takes seconds.

    A third of them would go into `torch.compile`, which kernels call while they are imported and
    text does not need.
    """
    import torch

    right = torch.compile
    torch.compile = lambda model=None, **_: model or (lambda function: function)  # type: ignore
    try:
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    finally:
        torch.compile = right
    return build_tokenizer


def _from_gpt2_files(flags: Namespace, build_tokenizer: Any) -> "MegatronTokenizerText":
    """GPT-2's tokenizer from its two files alone; Megatron's also asks the hub for a `gpt2`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE.from_file(flags.vocab_file, flags.merge_file))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    with tempfile.TemporaryDirectory() as folder:
        end = GPT2_END_OF_DOCUMENT
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end
        ).save_pretrained(folder)
        flags.tokenizer_type, flags.tokenizer_model = "HuggingFaceTokenizer", folder
        flags.vocab_file = flags.merge_file = None
        return build_tokenizer(flags)


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


def hugging_face(tokenizer: "MegatronTokenizerText") -> Any:
    """The Hugging Face tokenizer behind Megatron's wrapper, or None."""
    from megatron.core.tokenizers.text.libraries import HuggingFaceTokenizer

    wrapper = tokenizer._tokenizer
    return wrapper.tokenizer if isinstance(wrapper, HuggingFaceTokenizer) else None


def token_ids(tokenizer: "MegatronTokenizerText") -> dict[str, int]:
    """Every token's id: what `tokenizer_fingerprint` identifies a tokenizer by."""
    inner = hugging_face(tokenizer)
    if inner is not None:
        return inner.get_vocab()
    return {str(token): index for index, token in enumerate(tokenizer.vocab)}
