"""Put the documents of a dataset into a random order, with bounded memory.

Every document falls into a bucket at random, and each bucket, small enough for memory, is permuted:
together a uniformly random order of all documents.
"""

from pathlib import Path

import numpy as np

from megatron_let.data.indexed import LENGTH, PairWriter, pair_files

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
    _distribute(prefix, dtype, parts, dice)
    shuffled = prefix.with_name(f"{prefix.name}.shuffled")
    result = PairWriter(shuffled)
    for part in parts:
        files = pair_files(part)
        ids, lengths = np.fromfile(files[0], dtype), np.fromfile(files[1], LENGTH)
        result.add(*_picked(ids, lengths, dice.permutation(len(lengths))))
        for file in files:
            file.unlink()
    result.commit()
    result.close()
    return shuffled


def _distribute(
    prefix: Path, dtype: type[np.number], parts: list[Path], dice: np.random.Generator
) -> None:
    writers = [PairWriter(part) for part in parts]
    tokens, sizes = pair_files(prefix)
    with tokens.open("rb") as tokens_file, sizes.open("rb") as sizes_file:
        while len(lengths := np.fromfile(sizes_file, LENGTH, _DOCUMENTS)):
            ids = np.fromfile(tokens_file, dtype, int(lengths.sum(dtype=np.int64)))
            buckets = dice.integers(len(parts), size=len(lengths))
            for index in np.unique(buckets):
                writers[index].add(*_picked(ids, lengths, np.flatnonzero(buckets == index)))
    for writer in writers:
        writer.close()


def _picked(
    ids: np.ndarray, lengths: np.ndarray, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The documents of the indices `order`, in that order."""
    ends = np.cumsum(lengths, dtype=np.int64)
    pieces = [ids[ends[index] - lengths[index] : ends[index]] for index in order]
    return np.concatenate([ids[:0], *pieces]), lengths[order]
