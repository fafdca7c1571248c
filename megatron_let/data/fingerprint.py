"""Identify a tokenizer by what it maps, so data made with another one can be refused."""

import hashlib
import json


def tokenizer_fingerprint(token_to_id: dict[str, int]) -> str:
    """Return the SHA-256 (64 hex digits) of a tokenizer's complete token -> id map.

    It is the same exactly for tokenizers that give every token the same id, whatever their maps'
    order, or the size of a padded embedding. Hugging Face's map is `tokenizer.get_vocab()`.
    """
    # ASCII escapes keep the text well defined even for tokens that are not valid Unicode.
    canonical = json.dumps(sorted(token_to_id.items()), ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
