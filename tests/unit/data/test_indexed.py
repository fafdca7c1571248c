"""The streaming writer's bytes are those of Megatron's builder, cut off and taken up or not."""

from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_let.data import indexed
from megatron_let.data.indexed import PairWriter, write_index

LENGTHS = [3, 0, 5, 1, 0, 0, 700, 2]


def documents(dtype: type[np.number], lengths: list[int] = LENGTHS) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 60_000, n).astype(dtype) for n in lengths]


def add(writer: PairWriter, docs: list[np.ndarray]) -> None:
    writer.add(np.concatenate(docs), np.array([len(doc) for doc in docs]))


def reference(folder: Path, docs: list[np.ndarray], dtype: type[np.number]) -> list[bytes]:
    builder = IndexedDatasetBuilder(str(folder / "reference.bin"), dtype=dtype)
    for ids in docs:
        builder.add_document(ids, [len(ids)] if len(ids) else [])
    builder.finalize(str(folder / "reference.idx"))
    return [(folder / f"reference{suffix}").read_bytes() for suffix in (".bin", ".idx")]


def written(prefix: Path) -> list[bytes]:
    return [prefix.with_name(prefix.name + suffix).read_bytes() for suffix in (".bin", ".idx")]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_bytes_are_megatrons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type[np.number], chunk: int
) -> None:
    monkeypatch.setattr(indexed, "_CHUNK", chunk)
    docs, prefix = documents(dtype), tmp_path / "a.b"  # a name with a dot, as a subset may have
    writer = PairWriter(prefix)
    add(writer, docs[:3])
    add(writer, docs[3:])
    writer.close()
    write_index(prefix, dtype)
    assert written(prefix) == reference(tmp_path, docs, dtype)


def test_what_no_commit_covers_is_cut_off(tmp_path: Path) -> None:
    docs, prefix = documents(np.uint16), tmp_path / "out"
    first = PairWriter(prefix)
    add(first, docs[:4])
    committed = first.commit()
    add(first, docs[:2])  # lost: written behind the commit
    first.close()
    second = PairWriter(prefix, committed)
    add(second, docs[4:])
    second.close()
    write_index(prefix, np.uint16)
    assert written(prefix) == reference(tmp_path, docs, np.uint16)


def test_a_commit_without_a_document_in_between_is_the_one_before(tmp_path: Path) -> None:
    first = PairWriter(tmp_path / "out")
    add(first, documents(np.uint16)[:4])
    committed = first.commit()
    add(first, documents(np.uint16))  # lost
    first.close()
    second = PairWriter(tmp_path / "out", committed)
    assert second.commit() == committed
    second.close()


def test_a_file_shorter_than_its_commit_is_refused(tmp_path: Path) -> None:
    writer = PairWriter(tmp_path / "out")
    add(writer, documents(np.uint16))
    committed = writer.commit()
    writer.close()
    (tmp_path / "out.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="is shorter than the"):
        PairWriter(tmp_path / "out", committed)
