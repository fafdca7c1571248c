"""Reads Megatron's `torch_dist` checkpoints: on CPU, in one process, without Megatron.

The format tells where in the whole tensor each saved piece belongs, whatever the run's layout was.
Nothing that a file names is imported or called.
"""

import io
import math
import pickle
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_let.checkpoint.folder import read_metadata
from megatron_let.errors import UsageError
from megatron_let.upstream.inert import load_inert, why

COMMON_STATE = "common_state/shard_0_1"
"""Megatron-Core 0.19: everything that is not sharded, in one object of the data."""
OLDER_COMMON_STATE = "common.pt"
DAMAGED = (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, AssertionError)
"""What reading a file raises that is missing, cut or not what it should be."""


class Checkpoint:
    """One `torch_dist` checkpoint; what cannot be read of it is told by a `UsageError`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = read_metadata(folder)

    @property
    def names(self) -> set[str]:
        """Names of all tensors and objects."""
        return set(self._metadata.state_dict_metadata)

    def empty(self, name: str) -> torch.Tensor:
        """Return a tensor without data (on `meta`) of the saved one's shape and type."""
        meta = self._tensor(name)
        return torch.empty(meta.size, dtype=meta.properties.dtype, device="meta")

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        """Return a tensor, or its slice `[layer]`, in the type it was saved in.

        Only the saved pieces that overlap the slice are read. A slice that was saved as one piece
        is a view of the file (a private mapping): nothing is read before it is used, and a file
        that another process cuts meanwhile ends this one (SIGBUS), as with safetensors.
        """
        meta = self._tensor(name)
        start, size = [0] * len(meta.size), list(meta.size)
        if layer is not None:
            start[0], size[0] = layer, 1
        region = ChunkStorageMetadata(torch.Size(start), torch.Size(size))
        items = create_read_items_for_chunk_list(name, meta, [region])
        if len(items) == 1:
            target = self._piece(items[0])
        else:
            target = torch.empty(size, dtype=meta.properties.dtype)
            for item in items:
                _narrow(target, item.dest_offsets, item.lengths).copy_(self._piece(item))
        return target if layer is None else target[0]

    def unreadable_state(self) -> str | None:
        """Say why a run could not read what it reads first, None if it can."""
        try:
            torch.load(self._common_state(), "cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # a damaged pickle can raise anything
            return f"the run's state cannot be read: {why(error)}"
        return None

    def args(self) -> Namespace:
        """Return the run's arguments."""
        try:
            with self._told(COMMON_STATE):
                common = load_inert(self._common_state())
            return (common[0] if isinstance(common, list) else common)["args"]
        except (KeyError, IndexError) as error:
            raise UsageError(f"{self.folder} does not hold the arguments of its run.") from error

    def _tensor(self, name: str) -> TensorStorageMetadata:
        meta = self._metadata.state_dict_metadata[name]
        if not isinstance(meta, TensorStorageMetadata):
            raise UsageError(f"{name} in {self.folder} is not a tensor.")
        if sum(math.prod(chunk.sizes) for chunk in meta.chunks) != math.prod(meta.size):
            raise UsageError(f"{self.folder} does not hold all of {name}.")
        return meta

    def _common_state(self) -> io.BytesIO:
        """Read what is not sharded; a KeyError without."""
        older = self.folder / OLDER_COMMON_STATE
        found = older.read_bytes() if older.exists() else self._mapped(MetadataIndex(COMMON_STATE))
        return io.BytesIO(found)

    def _piece(self, item: ReadItem) -> torch.Tensor:
        stored = self._metadata.storage_data[item.storage_index]
        with self._told(item.storage_index.fqn):
            entry = self._mapped(item.storage_index)
            with (self.folder / stored.relative_path).open("rb") as file:
                view: Any = _create_file_view(file, stored.offset, stored.length)
                stand_in = torch.load(view, map_location="meta", weights_only=True)
            # It has no data; its storage tells where in the entry that is.
            storage = stand_in.untyped_storage()
            start: int = storage._checkpoint_offset  # type: ignore[assignment]
            # Entries start anywhere, so the data may not be aligned; CPUs do not mind.
            data = torch.frombuffer(entry[start : start + storage.nbytes()], dtype=stand_in.dtype)
            piece = data.as_strided(stand_in.shape, stand_in.stride(), stand_in.storage_offset())
            return _narrow(piece, item.storage_offsets, item.lengths)

    def _mapped(self, index: MetadataIndex) -> np.ndarray:
        """Return the bytes of one entry, which `torch.save` wrote, mapped from its file."""
        stored = self._metadata.storage_data[index]
        if stored.transform_descriptors:  # as a compression
            raise UsageError(f"it is saved with {', '.join(stored.transform_descriptors)}")
        # A private mapping ("c"), since PyTorch has no tensors that cannot be written to.
        with (self.folder / stored.relative_path).open("rb") as file:
            return np.memmap(file, mode="c", offset=stored.offset, shape=stored.length)

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        try:
            yield
        except DAMAGED as error:
            raise UsageError(f"{name} in {self.folder} cannot be read: {why(error)}") from error


def _narrow(tensor: torch.Tensor, offsets: Iterable[int], lengths: Iterable[int]) -> torch.Tensor:
    for dim, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor
