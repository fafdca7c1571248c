"""Parse a block of input into texts, and say of every record that is none what is wrong with it."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from megatron_let.data.sources import Block, Kind

GB_FOR_A_MB = 0.26
"""Memory that the tokenizers library takes at most for a text: of a token for each byte."""
GROUP_PARENT = "meta"
"""The object of a record that --split-by-meta looks into, as the Pile has it."""


@dataclass(frozen=True)
class Skipped:
    """Records that are no documents: so many from a line or row on, counted from 1."""

    path: str
    record: int
    reason: str
    records: int = 1

    def __str__(self) -> str:
        return f"{self.path}:{self.record}: {self.reason}"


@dataclass
class Documents:
    """The documents of a block, in order, with the numbers of their lines or rows."""

    records: list[int] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)
    groups: list[str] = field(default_factory=list)
    """With --split-by-meta the value of each one; else empty strings."""
    skipped: list[Skipped] = field(default_factory=list)


def columns(keys: Sequence[str], group_key: str | None) -> list[str]:
    """What `parse` reads of a table."""
    return [*keys, *([] if group_key is None else [GROUP_PARENT])]


def parse(
    block: Block, keys: Sequence[str], group_key: str | None, max_mb: float = math.inf
) -> Documents:
    """Read the records of `block`, whose texts are the values of `keys`.

    They are grouped by the value of `group_key` in their "meta". A text of more than `max_mb`
    million bytes is none.
    """
    found = Documents(texts={key: [] for key in keys})
    if block.kind == "damage":
        reason, number = block.content.tobytes().decode(), block.end.records - block.first + 1
        found.skipped.append(Skipped(block.path, block.first, reason, number))
        return found
    for number, content in enumerate(_contents(block), start=block.first):
        try:
            record = _record(content, block.kind, keys)
            texts = [_text(record, key, max_mb) for key in keys]
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
        return _rows(block.content)
    content = block.content.tobytes()
    if block.kind == "text":
        return [content]
    lines = content.split(b"\n")
    return lines if lines[-1] else lines[:-1]  # the last one may lack its end


def _rows(content: np.ndarray) -> list[dict[str, Any]]:
    """Rows of a stream; a cell that is not UTF-8 is an error instead of a value."""
    import pyarrow

    table = pyarrow.ipc.open_stream(content).read_next_batch()
    try:
        return table.to_pylist()
    except UnicodeDecodeError:
        columns = {name: list(map(_cell, table[name])) for name in table.schema.names}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _cell(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return error


def _record(content: Any, kind: Kind, keys: Sequence[str]) -> Any:
    if kind == "rows":
        return content
    try:
        if kind == "text":
            return dict.fromkeys(keys, content.decode("utf-8-sig"))  # without its mark of order
        return orjson.loads(content)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error}") from error
    except orjson.JSONDecodeError:
        pass
    try:
        # What Megatron's tool reads with: it knows NaN and Infinity, which a meta may hold.
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a JSON object in UTF-8: {error}") from error


def _text(record: Any, key: str, max_mb: float) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    if key not in record:
        raise ValueError(f"no key {key!r}; check --json-key(s)")
    text = record[key]
    try:
        if isinstance(text, UnicodeDecodeError):
            raise text
        if isinstance(text, bytes):  # of a binary column
            text = text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"the value of {key!r} is not UTF-8: {error}") from error
    if not isinstance(text, str):
        raise ValueError(f"the value of {key!r} must be a string, found {type(text).__name__}")
    try:
        size = len(text.encode()) / 1e6
    except UnicodeEncodeError as error:
        raise ValueError(f"the value of {key!r} is not valid Unicode: {error}") from error
    if size > max_mb:
        raise ValueError(
            f"longer than --max-document-mb {max_mb:g}: {key!r} holds {size:,.1f} MB, to tokenize "
            f"which can take {size * GB_FOR_A_MB:,.1f} GB; split it or raise the limit"
        )
    return text


def _group(record: dict[str, Any], key: str) -> str:
    meta = record.get(GROUP_PARENT)
    if not isinstance(meta, dict) or not isinstance(meta.get(key), str):
        raise ValueError(
            f"no {GROUP_PARENT!r} with a string {key!r} in it, by which to tell the subsets"
        )
    return meta[key]
