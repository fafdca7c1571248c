"""Write Megatron's .bin/.idx pairs as a stream that can be cut off and taken up again.

The bytes are those of Megatron's `IndexedDatasetBuilder`, which keeps the length of every document
in Python lists and cannot be resumed. Here the lengths lie on disk beside the tokens, and the index
is made from them at the end. `tests/unit/data/test_indexed.py` compares the two.
"""

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

HEADER = b"MMIDIDX\x00\x00"
"""What an index begins with."""
DTYPES = (
    np.uint8,
    np.int8,
    np.int16,
    np.int32,
    np.int64,
    np.float64,
    np.float32,
    np.uint16,
)
"""Types of tokens; an index has their place in this list, from 1."""
_LENGTH = np.dtype("<i4")
MAX_LENGTH = np.iinfo(_LENGTH).max
_CHUNK = 1 << 20
"""Documents in memory at once while the index is made."""


class PairWriter:
    """One dataset in the making: its tokens and the lengths of its documents.

    Args:
        prefix: `prefix`.bin and `prefix`.lengths are written.
        committed: what `commit` returned when the files were last known to be good; None starts
            anew.
    """

    def __init__(self, prefix: Path, committed: dict[str, int] | None = None) -> None:
        self._files = [_open_at(path, committed) for path in pair_files(prefix)]

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents of at most `MAX_LENGTH` tokens; an empty one holds no sequence."""
        tokens, sizes = self._files
        tokens.write(np.ascontiguousarray(ids))
        sizes.write(lengths.astype(_LENGTH))

    def commit(self) -> dict[str, int]:
        """Bring everything to the disk; return what makes a later writer go on from here."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        return {Path(file.name).suffix: file.tell() for file in self._files}

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def pair_files(prefix: Path) -> tuple[Path, Path]:
    """Where the tokens and the lengths of a dataset in the making lie."""
    # Not `with_suffix`: a subset's name may hold a dot.
    return prefix.with_name(f"{prefix.name}.bin"), prefix.with_name(f"{prefix.name}.lengths")


def _open_at(path: Path, committed: dict[str, int] | None) -> Any:
    if committed is None:
        return open(path, "wb")
    size = committed[path.suffix]
    if path.stat().st_size < size:
        raise ValueError(f"{path} is shorter than the {size} bytes that were written to it")
    file = open(path, "r+b")
    file.truncate(size)
    file.seek(size)
    return file


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """The type in which Megatron stores the tokens of a vocabulary of this size."""
    return np.uint16 if vocab_size < 65_500 else np.int32


def write_index(prefix: Path, dtype: type[np.number]) -> None:
    """Write `prefix`.idx from `prefix`.lengths, in the layout of Megatron's `_IndexWriter`."""
    _, path = pair_files(prefix)
    documents = path.stat().st_size // _LENGTH.itemsize
    sequences = sum(np.count_nonzero(lengths) for lengths in read_lengths(path))
    with prefix.with_name(f"{prefix.name}.idx").open("wb") as index:
        index.write(HEADER + struct.pack("<QB", 1, DTYPES.index(dtype) + 1))
        index.write(struct.pack("<QQ", sequences, documents + 1))
        for lengths in read_lengths(path):
            index.write(lengths[lengths > 0].tobytes())
        item = np.dtype(dtype).itemsize
        _write_sums(index, path, lambda lengths: lengths[lengths > 0].astype(np.int64) * item)
        _write_sums(index, path, lambda lengths: (lengths > 0).astype(np.int64), with_total=True)
        index.flush()
        os.fsync(index.fileno())


def read_lengths(path: Path) -> Iterator[np.ndarray]:
    """The lengths of the documents, some at a time."""
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK * _LENGTH.itemsize):
            yield np.frombuffer(chunk, _LENGTH)


def _write_sums(
    file: Any, path: Path, steps: Callable[[np.ndarray], np.ndarray], with_total: bool = False
) -> None:
    """The sum before each of the steps that documents make, int64, and behind them the total."""
    before = 0
    for lengths in read_lengths(path):
        sums = before + np.cumsum(steps(lengths))
        file.write(np.concatenate([[before], sums[:-1]]).astype(np.int64)[: len(sums)].tobytes())
        before = int(sums[-1]) if len(sums) else before
    if with_total:
        file.write(np.int64(before).tobytes())
