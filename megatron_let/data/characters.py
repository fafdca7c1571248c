"""Which characters two tokenizer libraries cut differently: their Unicode tables differ in age.

A pre-tokenizer cuts a text at its letters, digits, spaces and other characters. A character that
Unicode got last year is a letter to one library and nothing to another.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

# The planes with characters; the others are empty or private, alike in all versions.
_CODE_POINTS = [
    *(point for point in range(0x80, 0x40000) if not 0xD800 <= point < 0xE000),
    *range(0xE0000, 0xE1000),
]
_BLOCK = 64

Encode = Callable[[list[str]], Sequence[Sequence[int]]]
"""Token ids of each text."""


def revealing(source: str) -> str:
    """The tokenizer.json `source` with a vocabulary whose tokens show every cut beside a character.

    Only of byte-level tokenizers, since others do not cut by kinds of characters: they come back as
    they are. The merges join a letter, digit or comma with the first or last byte of its neighbour.
    """
    tokenizer = json.loads(source)
    if "ByteLevel" not in json.dumps(tokenizer["pre_tokenizer"]):
        return source
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    first, last = range(0xC2, 0xF5), range(0x80, 0xC0)
    neighbours = [ord(character) for character in "a1,"]
    pairs = [(one, other) for one in neighbours for other in first]
    pairs += [(one, other) for one in last for other in neighbours]
    merges = [(letters[one], letters[other]) for one, other in pairs]
    tokens = [*letters.values(), *(one + other for one, other in merges)]
    tokenizer["model"] |= {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}
    tokenizer |= {"added_tokens": [], "post_processor": None}
    return json.dumps(tokenizer)


class Characters:
    """A set of characters that is looked for in a text at some hundred megabytes a second.

    A regular expression takes a thousand times as long: characters beyond U+FFFF are compared one
    by one.
    """

    def __init__(self, points: Sequence[int]) -> None:
        self._is_in = np.zeros(0x110000, bool)
        self._is_in[list(points)] = True

    def occur_in(self, text: str) -> bool:
        """Whether one of them does."""
        return not text.isascii() and bool(self._is_in[_code_points(text)].any())


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def remembered(key: str, compute: Callable[[], list[int]]) -> list[int]:
    """The result of `compute`, kept in the user's cache folder where there is one to write to.

    Args:
        key: all that the result depends on.
        compute: takes seconds.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "megatron_let"
    file = folder / f"characters-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(file.read_text())
    result = compute()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(result))
        partial.replace(file)
    return result


def cut_differently(ours: Encode, theirs: Encode) -> list[int]:
    """The characters beside which two `revealing` tokenizers differ."""
    blocks = [_CODE_POINTS[i : i + _BLOCK] for i in range(0, len(_CODE_POINTS), _BLOCK)]
    suspects = [[point] for block in _differing(blocks, ours, theirs) for point in block]
    return [point for [point] in _differing(suspects, ours, theirs)]


def _differing(groups: list[list[int]], ours: Encode, theirs: Encode) -> list[list[int]]:
    texts = ["".join(map(_in_context, group)) for group in groups]
    pairs = zip(groups, ours(texts), theirs(texts), strict=True)
    return [group for group, one, other in pairs if list(one) != list(other)]


def _in_context(point: int) -> str:
    return f"a{chr(point)}1{chr(point)},{chr(point)}\n"
