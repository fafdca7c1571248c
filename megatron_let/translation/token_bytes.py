"""The bytes of every token of a tokenizer: what two tokenizers have in common.

Byte-level BPE (GPT-2, Llama 3, Qwen, tekken) writes each byte as a letter of its own; SentencePiece
and what follows it (Llama 2, Mistral, Gemma) a space as U+2581 and a rare byte as `<0xAB>`. Others,
which do not keep a text's bytes, are refused.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

from megatron_let.data.tokenizer import SentencePiece, Tokenizer
from megatron_let.errors import UsageError

SAMPLE = (
    "The First Law, of 1867.",
    "def f(x):\n\tif x  >= 10_000:\n        return {'a': x**2}\n\n\n",
    "na\u00efve caf\u00e9, \u00a7 5 \u2014 \u201cquoted\u201d\u2026",
    "\ufb01ne x\u00b2 \u2167 \u2460 \uff21\uff22",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u4e16\u754c \u0639\u0631\u0628\u064a",
    "\U0001f30d\U0001f469\u200d\U0001f680",
    "  two spaces in front, and a line's end \r\n",
)
"""Texts that must come back: capitals, numbers, white space, forms that NFKC replaces, scripts."""
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """A tokenizer, which `flag` names, and its tokens' bytes; UsageError if they keep no text's."""

    def __init__(self, tokenizer: Tokenizer, flag: str) -> None:
        self.tokenizer, fast = tokenizer, tokenizer.fast
        source = {} if fast is None else json.loads(fast.to_str())
        self._read_all_as_text()
        decoder = str(source.get("decoder"))
        self.looks_ahead = "ByteLevel" in decoder
        """Whether it cuts texts into words by a pattern, as byte-level ones do."""
        if not (self.looks_ahead or "\u2581" in decoder or isinstance(tokenizer, SentencePiece)):
            raise UsageError(
                f"{flag} is neither byte-level nor of SentencePiece's form, so that the bytes of "
                "its tokens are not known, by which two tokenizers meet. Choose a teacher of the "
                "student's tokenizer, or tokenizers of one of these forms."
            )
        self.bytes = self._bytes_by_id(source.get("added_tokens", []))
        """Of each id; none for a special token, and for the id behind the last one."""
        self.lengths = np.array([len(piece) for piece in self.bytes])
        self.adds_space = self.join(self.encode("a")) == b" a"
        """Whether a text's first token begins with a space that is not the text's."""
        self.always_adds_space = self.join(self.encode(" a")) == b"  a"
        """Whether it does where the text begins with one, too."""
        for text in SAMPLE:
            came_back = self.join(self.encode(text))
            if came_back not in (text.encode(), b" " * self.adds_space + text.encode()):
                shown = came_back.decode(errors="replace")
                raise UsageError(
                    f"{flag} does not keep the bytes of a text: {text!r} comes back as {shown!r}. "
                    "Two tokenizers meet where both end a token at the same byte: choose a "
                    "teacher of the student's tokenizer, or tokenizers that keep them."
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._read_all_as_text()  # a copy in a worker that was not forked is as it was read

    def _read_all_as_text(self) -> None:
        if self.tokenizer.fast is not None:  # a text that names a special token does not mean it
            self.tokenizer.fast.encode_special_tokens = True
            if getattr(self.tokenizer.fast.model, "dropout", None):
                self.tokenizer.fast.model.dropout = None  # of a text in random tokens, for training

    def _bytes_by_id(self, added: list[dict[str, Any]]) -> list[bytes]:
        rule = _of_byte_level if self.looks_ahead else _of_sentencepiece
        rule_of_added = str.encode if self.looks_ahead else rule
        ids = self.tokenizer.ids()
        table = [b""] * (max(ids.values()) + 2)
        for piece, index in ids.items():
            table[index] = rule(piece)
        for token in added:
            table[token["id"]] = b"" if token["special"] else rule_of_added(token["content"])
        for index in self.tokenizer.specials():
            table[index] = b""
        return table

    def encode(self, text: str) -> list[int]:
        """A text's tokens, none of them special."""
        fast = self.tokenizer.fast
        if fast is None:
            return self.tokenizer.tokenize(text)
        return fast.encode(text, add_special_tokens=False).ids

    def words(self, text: str) -> tuple[list[int], list[int | None]]:
        """A text's tokens, and the number of the word that each belongs to."""
        found = self.tokenizer.fast.encode(text, add_special_tokens=False)
        return found.ids, found.word_ids

    def join(self, ids: Sequence[int]) -> bytes:
        """The bytes of some tokens."""
        return b"".join(map(self.bytes.__getitem__, ids))


_BYTE_OF = {letter: byte for byte, letter in bytes_to_unicode().items()}


def _of_byte_level(piece: str) -> bytes:
    try:
        return bytes(map(_BYTE_OF.__getitem__, piece))
    except KeyError:
        return piece.encode()


def _of_sentencepiece(piece: str) -> bytes:
    if byte := _BYTE.fullmatch(piece):
        return bytes.fromhex(byte[1])
    return piece.replace("\u2581", " ").encode()
