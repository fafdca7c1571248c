"""Parse a block of input into texts, and say of every record that is none what is wrong with it."""

import json
from collections.abc import Iterable, Sequence
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
    groups: list[str] = field(default_factory=list)
    """With --split-by-meta the value of each one; else empty strings."""
    skipped: list[Skipped] = field(default_factory=list)


def parse(block: Block, keys: Sequence[str], group_key: str | None) -> Documents:
    """Read the records of `block`, whose texts are the values of `keys`.

    The value of `group_key` in a record's "meta" groups the documents; None groups none.
    """
    found = Documents(texts={key: [] for key in keys})
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
        for key, text in zip(keys, texts, strict=True):
            found.texts[key].append(text)
    return found


def _contents(block: Block) -> Iterable[Any]:
    if block.kind == "rows":
        return block.content.to_pylist()
    content = block.content.tobytes()
    if block.kind == "text":
        return [content]
    lines = content.split(b"\n")
    return lines if lines[-1] else lines[:-1]  # the last one may lack its end


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
        return json.loads(content.decode("utf-8-sig"))  # without a mark of byte order
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a JSON object in UTF-8: {error}") from error


def _text(record: Any, key: str) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    if key not in record:
        raise ValueError(f"no key {key!r}; check --json-keys")
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(f"the value of {key!r} must be a string, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the value of {key!r} is not valid Unicode: {error}") from error
    return text


def _group(record: dict[str, Any], key: str) -> str:
    meta = record.get(GROUP_PARENT)
    if not isinstance(meta, dict) or not isinstance(meta.get(key), str):
        raise ValueError(
            f"no {GROUP_PARENT!r} with a string {key!r} in it, which --split-by-meta asks for"
        )
    return meta[key]
