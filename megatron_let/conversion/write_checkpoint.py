"""Writes Megatron's `torch_dist` checkpoints: on CPU, in one process, a tensor at a time."""

import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from tqdm import tqdm

from megatron_let.conversion.output import PiecewiseFile

METADATA = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, tuple[torch.Tensor, bool]],
    read: Callable[[str, int | None], torch.Tensor],
    objects: Mapping[str, Any],
) -> None:
    """Write one checkpoint.

    Args:
        folder: an empty folder.
        tensors: of every tensor a stand-in (on `meta`) with its shape and type, and whether it is
            stacked over the layers: then each layer is a piece of its own, as Megatron saves it.
        read: returns a tensor by its name, or a layer of a stacked one.
        objects: everything else, by name.
    """
    pieces = [
        _piece(name, tensor, index, stacked)
        for name, (tensor, stacked) in tensors.items()
        for index in range(len(tensor) if stacked else 1)
    ]
    others = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in objects]
    bar = tqdm(total=len(pieces), desc="weights", disable=None)

    def get(index: MetadataIndex) -> Any:
        name = index.fqn
        if name in objects:
            return objects[name]
        bar.update()
        tensor, stacked = tensors[name]
        piece = read(name, index.index if stacked else None).to(tensor.dtype)
        return (piece.unsqueeze(0) if stacked else piece).contiguous()

    with bar, warnings.catch_warnings():
        # It says that one process writes, which is what we want.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        writer = FileSystemWriter(folder)
        writer.fs = _FileSystem()
        planner = _Planner([*others, *pieces], get)
        dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    (folder / "metadata.json").write_text(METADATA)


def _piece(name: str, tensor: torch.Tensor, index: int, stacked: bool) -> WriteItem:
    offsets, sizes = [0] * tensor.dim(), list(tensor.shape)
    if stacked:
        offsets[0], sizes[0] = index, 1
    chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    return WriteItem(
        MetadataIndex(name, chunk.offsets, index),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk, TensorProperties(tensor.dtype), tensor.shape),
    )


class _Planner(DefaultSavePlanner):
    """Tells the writer what there is, and gets each item when it is its turn."""

    def __init__(self, items: list[WriteItem], get: Callable[[MetadataIndex], Any]) -> None:
        super().__init__(flatten_state_dict=False)
        self._items, self._get = items, get

    def create_local_plan(self) -> SavePlan:
        """Return all of it."""
        return SavePlan(self._items)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return an object, or a piece of a tensor."""
        return self._get(index)


class _FileSystem(FileSystem):
    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Open a file to write."""
        with PiecewiseFile(path, mode) as stream:
            yield stream
