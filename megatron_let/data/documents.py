"""Parse a block of input into texts, and say of every record that is none what is wrong with it."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from megatron_let.data.sources import Block, Kind

GROUP_PARENT = "meta"
"""The object of a record that --split-by-meta looks into, as the Pile has it."""


@dataclass(frozen=True)
class Skipped:
    """A record that is no document."""

    path: str
    record: int
    """Number of its line or row, from 1."""
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.record}: {self.reason}"


@dataclass
class Documents:
    """The documents of a block, in order."""

    records: list[int] = field(default_factory=list)
    """Number of each one's line or row in its file."""
    texts: dict[str, list[str]] = field(default_factory=dict)
    """Of each JSON key."""
    text_bytes: dict[str, list[int]] = field(default_factory=dict)
    """Their sizes in UTF-8."""
    groups: list[str] = field(default_factory=list)
    """With --split-by-meta the value of each one; else empty strings."""
    skipped: list[Skipped] = field(default_factory=list)


def parse(block: Block, keys: Sequence[str], group_key: str | None) -> Documents:
    """Read the records of `block`.

    Args:
        block: from `InputFile.blocks`.
        keys: whose values are the texts.
        group_key: the key in a record's "meta" whose value groups the documents; None groups none.
    """
    found = Documents(texts={key: [] for key in keys}, text_bytes={key: [] for key in keys})
    for number, content in enumerate(_contents(block), start=block.first):
        try:
            record = _record(content, block.kind, keys)
            texts = [_text(record, key) for key in keys]
            group = "" if group_key is None else _group(record, group_key)
        except ValueError as error:
            found.skipped.append(Skipped(block.path, number, str(error)))
            continue
        found.records.append(number)
        found.groups.append(group)
        for key, (text, size) in zip(keys, texts, strict=True):
            found.texts[key].append(text)
            found.text_bytes[key].append(size)
    return found


def _contents(block: Block) -> Iterable[Any]:
    if block.kind == "rows":
        return block.content.to_pylist()
    content = block.content.tobytes()
    return _lines(content) if block.kind == "lines" else [content]


def _lines(content: bytes) -> Iterator[memoryview]:
    """The lines without their ends; as views, since most of a line is one text."""
    view, start = memoryview(content), 0
    while (end := content.find(b"\n", start)) >= 0:
        yield view[start:end]
        start = end + 1
    if start < len(content):  # the last one lacks its end
        yield view[start:]


def _record(content: Any, kind: Kind, keys: Sequence[str]) -> Any:
    if kind == "rows":
        return content
    try:
        if kind == "text":
            return dict.fromkeys(keys, content.decode())
        return orjson.loads(content)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error}") from error
    except orjson.JSONDecodeError:
        pass
    try:
        # What Megatron's tool reads with: it knows NaN and Infinity, which a meta may hold.
        return json.loads(content.tobytes().decode("utf-8-sig"))  # without a mark of byte order
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a JSON object in UTF-8: {error}") from error


def _text(record: Any, key: str) -> tuple[str, int]:
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    if key not in record:
        raise ValueError(f"no key {key!r}; check --json-keys")
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(f"the value of {key!r} must be a string, found {type(text).__name__}")
    try:
        return text, len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"the value of {key!r} is not valid Unicode: {error}") from error


def _group(record: dict[str, Any], key: str) -> str:
    meta = record.get(GROUP_PARENT)
    if not isinstance(meta, dict) or not isinstance(meta.get(key), str):
        raise ValueError(
            f"no {GROUP_PARENT!r} with a string {key!r} in it, which --split-by-meta asks for"
        )
    return meta[key]
