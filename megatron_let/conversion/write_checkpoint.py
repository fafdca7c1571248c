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

from megatron_let.conversion.safetensors_folder import PIECE_BYTES

METADATA = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'

ReadChunk = Callable[[str, int | None], torch.Tensor]


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, tuple[torch.Tensor, bool]],
    read: ReadChunk,
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
    planner = _Planner(tensors, read, objects)
    with warnings.catch_warnings():
        # It says that one process writes, which is what we want.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        writer = FileSystemWriter(folder)
        writer.fs = _FileSystem()
        dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    (folder / "metadata.json").write_text(METADATA)


class _Planner(DefaultSavePlanner):
    """Tells the writer what there is, and gets each piece when it is its turn."""

    def __init__(
        self,
        tensors: Mapping[str, tuple[torch.Tensor, bool]],
        read: ReadChunk,
        objects: Mapping[str, Any],
    ) -> None:
        super().__init__(flatten_state_dict=False)
        self._tensors = tensors
        self._read = read
        self._objects = objects

    def create_local_plan(self) -> SavePlan:
        """Return an item for each object and each piece of a tensor."""
        items = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self._objects]
        for name, (tensor, stacked) in self._tensors.items():
            pieces = len(tensor) if stacked else 1
            items += [_piece(name, tensor, i, stacked) for i in range(pieces)]
        return SavePlan(items)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Return the bytes of an object, or a piece of a tensor."""
        name = write_item.index.fqn
        if write_item.type == WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save(self._objects[name], buffer)
            return buffer
        tensor, stacked = self._tensors[name]
        layer = write_item.index.index if stacked else None
        piece = self._read(name, layer).to(tensor.dtype)
        return (piece.unsqueeze(0) if stacked else piece).contiguous()


class _FileSystem(FileSystem):
    """Writes in pieces of `PIECE_BYTES`."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Open a file."""
        with _File(path, mode) if mode == "wb" else super().create_stream(path, mode) as stream:
            yield stream


class _File(io.FileIO):
    def write(self, data: Any) -> int:
        """Write all of it; returns the bytes."""
        view = memoryview(data).cast("B")
        size = len(view)
        while view:
            view = view[super().write(view[:PIECE_BYTES]) :]
        return size


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
