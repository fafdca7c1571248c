"""What Megatron's tokenizers know and do not tell."""

from typing import Any

from megatron.core.tokenizers.text.libraries import HuggingFaceTokenizer


def token_ids(tokenizer: Any) -> dict[str, int]:
    """Return every token's id: what `data.tokenizer.Tokenizer.ids` is of ours."""
    if isinstance(tokenizer._tokenizer, HuggingFaceTokenizer):
        return tokenizer._tokenizer.tokenizer.get_vocab()
    return {str(token): index for index, token in enumerate(tokenizer.vocab)}
