"""Put the documents of a dataset into a random order, with bounded memory.

Every document falls into a bucket at random, and each bucket, small enough for memory, is permuted:
together a uniformly random order of all documents.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_let.data.indexed import PairWriter, pair_files, read_lengths

BUCKET_BYTES = 256 * 1024**2
MAX_BUCKETS = 400
"""Two open files each, and a process may usually open 1,024."""
_DOCUMENTS = 1024
"""Distributed at once."""


def shuffle_documents(prefix: Path, dtype: type[np.number], seed: int) -> Path:
    """Write the documents of `prefix`.bin and `prefix`.lengths once more, in the order of `seed`.

    Returns their new prefix. Needs twice the dataset's size on the disk, and one bucket of memory.
    """
    tokens, _ = pair_files(prefix)
    buckets = min(MAX_BUCKETS, 1 + tokens.stat().st_size // BUCKET_BYTES)
    parts = [prefix.with_name(f"{prefix.name}.bucket{index}") for index in range(buckets)]
    dice = np.random.default_rng(seed)
    writers = [PairWriter(part) for part in parts]
    for ids, lengths in _chunks(prefix, dtype):
        _scatter(ids, lengths, dice.integers(buckets, size=len(lengths)), writers)
    shuffled = prefix.with_name(f"{prefix.name}.shuffled")
    result = PairWriter(shuffled)
    for part, writer in zip(parts, writers, strict=True):
        writer.close()
        ids, lengths = _whole(part, dtype)
        result.add(*_picked(ids, lengths, dice.permutation(len(lengths))))
        for file in pair_files(part):
            file.unlink()
    result.commit()
    result.close()
    return shuffled


def _chunks(prefix: Path, dtype: type[np.number]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    tokens, sizes = pair_files(prefix)
    with tokens.open("rb") as file:
        for many in read_lengths(sizes):
            for first in range(0, len(many), _DOCUMENTS):
                lengths = many[first : first + _DOCUMENTS]
                yield np.fromfile(file, dtype, int(lengths.sum(dtype=np.int64))), lengths


def _scatter(
    ids: np.ndarray, lengths: np.ndarray, bucket: np.ndarray, writers: list[PairWriter]
) -> None:
    for index in np.unique(bucket):
        writers[index].add(*_picked(ids, lengths, np.flatnonzero(bucket == index)))


def _picked(
    ids: np.ndarray, lengths: np.ndarray, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The documents of the indices `order`, in that order."""
    ends = np.cumsum(lengths, dtype=np.int64)
    pieces = [ids[ends[index] - lengths[index] : ends[index]] for index in order]
    return np.concatenate(pieces) if pieces else ids[:0], lengths[order]


def _whole(prefix: Path, dtype: type[np.number]) -> tuple[np.ndarray, np.ndarray]:
    tokens, sizes = pair_files(prefix)
    return np.fromfile(tokens, dtype), np.concatenate([np.empty(0, "<i4"), *read_lengths(sizes)])
