"""Write Megatron's .bin/.idx pairs as a stream that can be cut off and taken up again.

The bytes are those of Megatron's `IndexedDatasetBuilder`, which keeps the length of every document
in Python lists. Here they lie on disk beside the tokens, and the index is made from them.
"""

import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_let.files import commit

HEADER = b"MMIDIDX\x00\x00"
HEAD = struct.Struct("<9sQBQQ")
"""How an index begins: `HEADER`, 1, the type of tokens, numbers of sequences and boundaries."""
DTYPES = (np.uint8, np.int8, np.int16, np.int32, np.int64, np.float64, np.float32, np.uint16)
"""Types of tokens; an index has their place in this list, from 1."""
ENDINGS = (".bin", ".json", ".idx")
"""Of a finished dataset's files; the index is moved last, since a reader opens it first."""
LENGTH = np.dtype("<i4")
_CHUNK = 1 << 20
"""Documents in memory at once while the index is made."""


class PairWriter:
    """Writes `prefix`.bin and `prefix`.lengths, the tokens and the documents' lengths.

    Begins behind what they were when `commit` returned `committed`; None starts anew.
    """

    def __init__(self, prefix: Path, committed: Mapping[str, int] | None = None) -> None:
        sizes = committed or {".bin": 0, ".lengths": 0}
        self._files = {end: open_at(Path(f"{prefix}{end}"), size) for end, size in sizes.items()}

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents; an empty one holds no sequence."""
        self._files[".bin"].write(np.ascontiguousarray(ids))
        self._files[".lengths"].write(lengths.astype(LENGTH))

    def commit(self) -> dict[str, int]:
        """Bring everything to the disk; return what makes a later writer go on from here."""
        return {end: commit(file) for end, file in self._files.items()}

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


def open_at(path: Path, size: int) -> BinaryIO:
    """Open a file to write behind its first `size` bytes; what follows them is cut off."""
    file = open(path, "ab")
    if file.tell() < size:
        raise ValueError(f"{path} is shorter than the {size} bytes that were written to it")
    file.truncate(size)
    file.seek(size)
    return file


def check_folder_of(prefix: str) -> None:
    """Raise ValueError if there is no folder for what a prefix names."""
    folder = os.path.dirname(prefix) or "."
    if not os.path.isdir(folder):
        raise ValueError(f"the output folder {folder} does not exist; create it first")


def check_absent(outputs: Iterable[str]) -> None:
    """Raise ValueError if there is one of the files already."""
    for path in filter(os.path.exists, outputs):
        raise ValueError(
            f"output {path} exists already and is not overwritten; move it away or choose another "
            "--output-prefix"
        )


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """The type in which Megatron stores the tokens of a vocabulary of this size."""
    return np.uint16 if vocab_size < 65_500 else np.int32


def write_index(prefix: Path, dtype: type[np.number]) -> None:
    """Write `prefix`.idx from `prefix`.lengths, in the layout of Megatron's `_IndexWriter`."""
    path = Path(f"{prefix}.lengths")
    documents = path.stat().st_size // LENGTH.itemsize
    sequences = sum(np.count_nonzero(lengths) for lengths in _chunks(path))
    with open(f"{prefix}.idx", "wb") as index:
        index.write(HEAD.pack(HEADER, 1, DTYPES.index(dtype) + 1, sequences, documents + 1))
        for lengths in _chunks(path):
            index.write(lengths[lengths > 0])
        before = 0  # bytes
        for lengths in _chunks(path):
            sizes = lengths[lengths > 0].astype(np.int64) * np.dtype(dtype).itemsize
            index.write(before + np.cumsum(sizes) - sizes)
            before += int(sizes.sum())
        index.write(bytes(8))  # the first document begins with the first sequence
        before = 0  # sequences
        for lengths in _chunks(path):
            index.write(before + np.cumsum(lengths > 0, dtype=np.int64))
            before += int(np.count_nonzero(lengths))
        commit(index)


def _chunks(path: Path) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while len(lengths := np.fromfile(file, LENGTH, _CHUNK)):
            yield lengths
