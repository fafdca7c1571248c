"""Writes Megatron's `torch_dist` checkpoints: on CPU, in one process, a tensor at a time."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import (
    CheckpointException,
    ChunkStorageMetadata,
    DefaultSavePlanner,
    FileSystemWriter,
)
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from tqdm import tqdm

from megatron_let.conversion.checks import check_finite
from megatron_let.conversion.output import PiecewiseFile

METADATA = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, tuple[torch.Tensor, bool]],
    read: Callable[[str, int | None], torch.Tensor],
    objects: Mapping[str, Any],
) -> None:
    """Write one checkpoint into an empty folder.

    `tensors` has of every tensor a stand-in (on `meta`) with its shape and type, and whether it is
    stacked over the layers: then each layer is a piece of its own, as Megatron saves it. `read`
    returns a tensor by its name, or a layer of a stacked one. `objects` is everything else.
    """
    pieces = [
        _piece(name, tensor, index, stacked)
        for name, (tensor, stacked) in tensors.items()
        for index in range(len(tensor) if stacked else 1)
    ]
    others = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in objects]
    bar = tqdm(total=len(pieces), desc="weights", disable=None)

    class Planner(DefaultSavePlanner):
        """Tells the writer what there is, and gets each item when it is its turn."""

        def create_local_plan(self) -> SavePlan:
            return SavePlan([*others, *pieces])

        def lookup_object(self, index: MetadataIndex) -> Any:
            name = index.fqn
            if name in objects:
                return objects[name]
            bar.update()
            tensor, stacked = tensors[name]
            piece = read(name, index.index if stacked else None).to(tensor.dtype)
            check_finite(name, piece)  # a cast may be too much for it
            return (piece.unsqueeze(0) if stacked else piece).contiguous()

    with bar, warnings.catch_warnings():
        # It says that one process writes, which is what we want.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        writer = FileSystemWriter(folder)
        writer.fs.create_stream = PiecewiseFile  # type: ignore[method-assign, assignment]
        planner = Planner(flatten_state_dict=False)
        try:
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as error:  # hides what `read` or the disk has said
            raise next(iter(error.failures.values()))[0] from None
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
