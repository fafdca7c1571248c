"""Look into .bin/.idx pairs: are they whole, how long are the documents, what do they say."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_let.data.indexed import DTYPES, HEAD, HEADER
from megatron_let.errors import UsageError
from megatron_let.files import sha256

_SCANNED_BYTES = 32 * 1024**2


@dataclass(frozen=True)
class Pair:
    """A dataset whose index agrees with itself and with its tokens' size."""

    prefix: str
    dtype: np.dtype
    lengths: np.ndarray
    """Tokens of each sequence, `[sequences]`; a view of the file."""
    pointers: np.ndarray
    """Byte at which each sequence begins, `[sequences]`."""
    documents: np.ndarray
    """Sequence at which each document begins, and behind the last one, `[documents + 1]`."""
    sidecar: dict[str, Any]
    """What `megatron-let preprocess` wrote beside it; empty without."""

    @property
    def counts(self) -> dict[str, int]:
        """What the sidecar has under the same names."""
        return {
            "documents": len(self.documents) - 1,
            "empty_documents": int((np.diff(self.documents) == 0).sum()),
            "tokens": int(self.lengths.sum(dtype=np.int64)),
        }

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document."""
        first, last = self.documents[index : index + 2]
        size = int(self.lengths[first:last].sum(dtype=np.int64))
        start = int(self.pointers[first]) if size else 0
        return np.fromfile(f"{self.prefix}.bin", self.dtype, size, offset=start)


def open_pair(prefix: str) -> Pair:
    """Read `prefix`.idx and compare it with itself and `prefix`.bin; ValueError names a damage."""
    pair = Pair(prefix, *_read_index(prefix), read_sidecar(prefix))
    lengths, documents = pair.lengths, pair.documents
    if (lengths < 0).any():
        raise ValueError(f"{prefix}.idx has a sequence of negative length")
    sizes = lengths.astype(np.int64) * pair.dtype.itemsize
    if not np.array_equal(pair.pointers, np.cumsum(sizes) - sizes):
        raise ValueError(f"{prefix}.idx has sequences that do not follow each other in the .bin")
    ends = [*documents[:1], *documents[-1:]]
    if ends != [0, len(lengths)] or (np.diff(documents) < 0).any():
        raise ValueError(
            f"{prefix}.idx has documents that do not cover its {len(lengths)} sequences"
        )
    return pair


def read_sidecar(prefix: str) -> dict[str, Any]:
    """Return what is written beside a pair, if anything; UsageError if that is damaged."""
    path = Path(f"{prefix}.json")
    try:
        about = json.loads(path.read_text()) if path.exists() else {}
        if not isinstance(about, dict):
            raise ValueError("no JSON object")
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} is damaged ({error}): remove it, or write the pair anew"
        ) from error
    return about


def first_tokens(prefix: str, number: int) -> np.ndarray:
    """A pair's first tokens, the same work for any size; ValueError if its sizes do not agree."""
    dtype, *_ = _read_index(prefix)
    return np.fromfile(f"{prefix}.bin", dtype, number)


def _read_index(prefix: str) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """The type of the tokens; lengths, pointers and documents as views of the file."""
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index, tokens):
        if not path.is_file():
            raise ValueError(f"{path} does not exist; give a prefix without .bin or .idx")
    with index.open("rb") as file:
        head = file.read(HEAD.size)
    if len(head) < HEAD.size or not head.startswith(HEADER):
        raise ValueError(f"{index} is no index of Megatron's: it does not begin with MMIDIDX")
    _, version, code, sequences, boundaries = HEAD.unpack(head)
    if version != 1 or not 1 <= code <= len(DTYPES):
        raise ValueError(f"{index} has version {version} and token type {code}, which are unknown")
    ends = [4 * sequences, 12 * sequences, 12 * sequences + 8 * boundaries]
    size, wanted = index.stat().st_size, HEAD.size + ends[-1]
    if size != wanted:
        raise ValueError(
            f"{index} has {size} bytes and should have {wanted} for {sequences} sequences: it was "
            "cut off or is not complete"
        )
    arrays = np.split(np.memmap(index, np.uint8, "r", offset=HEAD.size), ends[:-1])
    lengths, pointers, documents = map(np.ndarray.view, arrays, ("<i4", "<i8", "<i8"))
    dtype = np.dtype(DTYPES[code - 1])
    size = tokens.stat().st_size
    wanted = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize if sequences else 0
    if size != wanted:
        raise ValueError(f"{tokens} has {size} bytes and {index.name} speaks of {wanted}")
    return dtype, lengths, pointers, documents


def check_tokens(pair: Pair, vocab_size: int) -> None:
    """Raise ValueError for a count that is not the sidecar's or an id outside the vocabulary."""
    for name, count in pair.counts.items():
        if (told := pair.sidecar.get(name, count)) != count:
            raise ValueError(
                f"{pair.prefix} has {count:,} {name} and {pair.prefix}.json says {told:,}: one of "
                "them was replaced"
            )
    path, first = Path(f"{pair.prefix}.bin"), 0
    with (
        path.open("rb") as file,
        tqdm(total=path.stat().st_size, unit="B", unit_scale=True, disable=None) as bar,
    ):
        while len(ids := np.fromfile(file, pair.dtype, _SCANNED_BYTES // pair.dtype.itemsize)):
            wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
            if len(wrong):
                raise ValueError(
                    f"{path} has the id {ids[wrong[0]]} at token {first + wrong[0]:,}, but the "
                    f"vocabulary has {vocab_size:,} tokens"
                )
            first += len(ids)
            bar.update(ids.nbytes)


def checksum(pair: Pair) -> dict[str, str]:
    """SHA-256 of both files, to compare copies."""
    return {suffix: sha256(Path(pair.prefix + suffix)) for suffix in (".bin", ".idx")}


def summary(pair: Pair) -> str:
    """Counts, and a histogram of the documents' lengths by powers of two; fits a screen."""
    sums = np.concatenate([[0], np.cumsum(pair.lengths, dtype=np.int64)])
    sizes, counts = np.diff(sums[pair.documents]), pair.counts
    lines = [
        pair.prefix,
        f"{counts['documents']:,} documents ({counts['empty_documents']:,} empty), "
        f"{counts['tokens']:,} tokens of {pair.dtype.name}",
    ]
    if len(sizes):
        low, mid, high = np.percentile(sizes, [10, 50, 90]).astype(int)
        lines.append(
            f"tokens a document: mean {sizes.mean():,.0f}, 10 % {low:,}, median {mid:,}, "
            f"90 % {high:,}, longest {sizes.max():,}"
        )
    about = pair.sidecar
    if {"tokenizer_fingerprint", "vocab_size", "eod_id"} <= about.keys():
        lines.append(
            f"made with the tokenizer {about['tokenizer_fingerprint'][:12]} of "
            f"{about['vocab_size']:,} tokens, end of document {about['eod_id']}, "
            f"{sum(about.get('skipped', {}).values()):,} records left out"
        )
    return "\n".join([*lines, "", *_histogram(sizes)])


def _histogram(sizes: np.ndarray) -> Iterator[str]:
    powers = np.ceil(np.log2(np.maximum(sizes, 1))).astype(int)
    counts = np.bincount(powers)
    for power in range(powers.min(initial=64), len(counts)):
        bar = "#" * round(40 * counts[power] / counts.max())
        yield f"  up to {2**power:>11,} {counts[power]:>13,} {bar}"
