"""What is asked of preprocessing, and what a worker of it does with a block."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_let.data.documents import Documents, Skipped, parse
from megatron_let.data.engines import Engine, Gigatoken, Rows
from megatron_let.data.sources import Block, Position
from megatron_let.data.tokenizer import TokenizerConfig

VERIFIED_FIRST = 100
"""Records at the start of the input that are tokenized by both engines."""
VERIFIED_BEGINNING = 4_000
"""Characters of each that are: the input may begin with books."""


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig(TokenizerConfig):
    """What to tokenize and where to write it; the fields are the tool's flags (`--help`)."""

    input: tuple[str, ...]
    output_prefix: str
    json_keys: tuple[str, ...] = ("text",)
    split_by_meta: str | None = None
    """Key in each record's "meta" whose values get datasets of their own."""
    append_eod: bool = False
    engine: str = "auto"
    verify_fraction: float = 0.001
    """Of the documents behind the first ones, the part that gigatoken's tokens are compared on."""
    on_error: Literal["stop", "skip"] = "stop"
    max_document_mb: float = 12
    """Million bytes of text that a document may have: tokenizing takes many times its memory."""
    workers: int = 1
    """Processes that tokenize, besides the one that reads and writes."""
    log_interval: int = 100_000
    """Documents between two progress lines."""


class EngineDiffers(Exception):
    """gigatoken gave other tokens than the tokenizer's own library; says for which document."""


@dataclass(frozen=True)
class Part:
    """Documents of one JSON key and one value of --split-by-meta, or an empty one."""

    group: str
    key: str
    ids: np.ndarray
    """Of all of them, one behind the other, `[sum of lengths]`."""
    lengths: np.ndarray
    """`[documents]`, int64."""
    text_bytes: int


@dataclass(frozen=True)
class EncodedBlock:
    """What became of one block."""

    parts: list[Part]
    skipped: list[Skipped]
    documents: int
    size: int
    end: Position


@dataclass(frozen=True)
class BlockEncoder:
    """Turns blocks into token ids, exactly as Megatron's tokenizer does.

    Raises `EngineDiffers`, and ValueError for a record that is no document if `on_error` is "stop".
    """

    config: PreprocessConfig
    engine: Engine
    eod: int | None
    dtype: type[np.number]

    def __call__(self, block: Block) -> EncodedBlock:
        """Encode one block."""
        config = self.config
        documents = parse(block, config.json_keys, config.split_by_meta, config.max_document_mb)
        if documents.skipped and config.on_error == "stop":
            raise ValueError(
                f"{documents.skipped[0]} (--on-error skip leaves such records out and lists them)"
            )
        return EncodedBlock(
            parts=[part for key in config.json_keys for part in self._parts(key, block, documents)],
            skipped=documents.skipped,
            documents=len(documents.records),
            size=block.content.nbytes,
            end=block.end,
        )

    def _parts(self, key: str, block: Block, documents: Documents) -> Iterator[Part]:
        rows = self.engine.encode(documents.texts[key])
        if isinstance(self.engine, Gigatoken):
            self._verify(self.engine, rows, key, block, documents)
        for group in dict.fromkeys(documents.groups):
            places = [place for place, its in enumerate(documents.groups) if its == group]
            ids, lengths = with_end([rows[place] for place in places], self.eod, self.dtype)
            text_bytes = sum(len(documents.texts[key][place].encode()) for place in places)
            yield Part(group, key, ids, lengths, text_bytes)

    def _verify(
        self, engine: Gigatoken, rows: Rows, key: str, block: Block, documents: Documents
    ) -> None:
        records, texts = np.array(documents.records), documents.texts[key]
        dice = np.random.default_rng([block.end.file, block.first])
        whole = dice.random(len(records)) < self.config.verify_fraction
        first = (records <= VERIFIED_FIRST) & (block.end.file == 0)
        places = np.flatnonzero(whole | first).tolist()
        checked = [texts[place][: None if whole[place] else VERIFIED_BEGINNING] for place in places]
        references = engine.reference.encode(checked)
        for place, text, expected in zip(places, checked, references, strict=True):
            is_cut = len(text) < len(texts[place])
            row = engine.encode([text])[0] if is_cut else rows[place]
            if not np.array_equal(row, expected):
                raise EngineDiffers(f"{block.path}:{records[place]} (key {key!r})")


def with_end(rows: Rows, eod: int | None, dtype: type[np.number]) -> tuple[np.ndarray, np.ndarray]:
    """All ids in `dtype`, with `eod` behind every text that is not empty, and the new lengths."""
    end = [] if eod is None else [np.array([eod])]
    pieces = [piece for row in rows if len(row) for piece in (row, *end)]
    lengths = np.fromiter((len(row) + len(end) * (len(row) > 0) for row in rows), np.int64)
    empty = np.empty(0, dtype)
    return np.concatenate([empty, *pieces], dtype=dtype, casting="unsafe"), lengths


def dataset_name(group: str, key: str) -> str:
    """What a dataset is called behind the output prefix: Megatron's KEY_document, or per group."""
    slug = re.sub(r"(?:[^\w.]|_)+", "-", group).strip("-.")
    return f"{slug}_{key}_document" if group else f"{key}_document"
