"""Reads Megatron's `torch_dist` checkpoints: on CPU, in one process, without Megatron.

The format is layout-free: it tells where in the whole tensor each saved piece belongs, so the
parallel layout of the run does not matter. Nothing that a file names is imported or called:
tensors are read with `weights_only`, and the two pickles of the format by restricted loaders.
"""

import io
import json
import math
import mmap
import os
import pickle
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_let.errors import UsageError

TRACKER = "latest_checkpointed_iteration.txt"
COMMON_STATE = "common_state/shard_0_1"
"""Megatron-Core 0.19: everything that is not sharded, in one object of the data."""
OLDER_COMMON_STATE = "common.pt"

METADATA_CLASSES = {
    "torch": "Size float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 "
    "int8 uint8 bool",
    "pathlib": "PosixPath",
    "torch.serialization": "_get_layout",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.distributed.checkpoint.metadata": "Metadata MetadataIndex StorageMeta "
    "TensorStorageMetadata BytesStorageMetadata TensorProperties ChunkStorageMetadata "
    "_MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.planner": "SavePlan WriteItem WriteItemType TensorWriteData",
}
"""All that a `.metadata` file may name; it is a plain pickle."""

DAMAGED = (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, AssertionError)
"""What reading a file raises that is missing, cut or not what it should be."""


def find_checkpoint(load: Path, step: int | None = None) -> Path:
    """Return the folder of one checkpoint below `load` (`--save` of the run).

    Args:
        load: the folder with `latest_checkpointed_iteration.txt`.
        step: the iteration to take; the tracker's if None.

    Raises:
        UsageError: there is no such checkpoint, or it has another format than `torch_dist`.
    """
    folder = load / _step_folder(load, step)
    if not folder.is_dir():
        found = sorted(path.name for path in load.glob("iter_*"))
        raise UsageError(f"No checkpoint at {folder}. {load} holds: {', '.join(found) or 'none'}.")
    config = folder / "metadata.json"
    try:
        backend = json.loads(config.read_text())["sharded_backend"] if config.exists() else "torch"
    except (ValueError, KeyError) as error:
        raise UsageError(f"{config} is damaged: {error}") from error
    if backend != "torch_dist":
        raise UsageError(
            f"{folder} was saved with --ckpt-format {backend}; only torch_dist can be read."
        )
    return folder


def _step_folder(load: Path, step: int | None) -> str:
    if step is not None:
        return f"iter_{step:07d}"
    tracker = load / TRACKER
    if not tracker.is_file():
        raise UsageError(
            f"--load {load} has no {TRACKER}: give the folder that was the run's --save, not an "
            "iter_ folder inside it; --ckpt-step chooses among those."
        )
    word = tracker.read_text().strip()
    if word != "release" and not word.isdecimal():
        raise UsageError(f"{tracker} holds {word!r}, which is not an iteration.")
    return word if word == "release" else f"iter_{int(word):07d}"


def stored_bytes(folder: Path) -> dict[str, int]:
    """Return the least size in bytes of every data file of a checkpoint, by its `.metadata`.

    Raises:
        UsageError: the folder has no readable `.metadata`.
    """
    sizes: dict[str, int] = {}
    for stored in _read_metadata(folder).storage_data.values():
        end = stored.offset + stored.length
        sizes[stored.relative_path] = max(end, sizes.get(stored.relative_path, 0))
    return sizes


class Checkpoint:
    """One `torch_dist` checkpoint; tensors are read one at a time, or a slice of one.

    Raises:
        UsageError: the folder has no readable `.metadata`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = _read_metadata(folder)

    @property
    def names(self) -> set[str]:
        """Names of all tensors and objects."""
        return set(self._metadata.state_dict_metadata)

    def empty(self, name: str) -> torch.Tensor:
        """Return a tensor without data (on `meta`) of the saved one's shape and type.

        Raises:
            UsageError: it is an object, or a piece was never saved.
        """
        meta = self._tensor(name)
        return torch.empty(meta.size, dtype=meta.properties.dtype, device="meta")

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        """Return a tensor, or its slice `[layer]`, in the type it was saved in.

        Only the saved pieces that overlap the slice are read. A slice that was saved as one piece
        is a view of the file (a private mapping): nothing is read before it is used, and a file
        that another process cuts meanwhile ends this one (SIGBUS), as with safetensors.

        Raises:
            UsageError: it is an object, a piece was never saved, or a file is missing or damaged.
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

    def args(self) -> Namespace:
        """Return the run's arguments.

        Raises:
            UsageError: the checkpoint was saved without them, or a file is missing or damaged.
        """
        older = self.folder / OLDER_COMMON_STATE
        if older.exists():
            common = _load_inert(io.BytesIO(older.read_bytes()))
        elif COMMON_STATE in self.names:
            common = self._object(COMMON_STATE)[0]
        else:
            common = {}
        if "args" not in common:
            raise UsageError(f"{self.folder} does not hold the arguments of its run.")
        return common["args"]

    def _tensor(self, name: str) -> TensorStorageMetadata:
        meta = self._metadata.state_dict_metadata[name]
        if not isinstance(meta, TensorStorageMetadata):
            raise UsageError(f"{name} in {self.folder} is not a tensor.")
        if sum(math.prod(chunk.sizes) for chunk in meta.chunks) != math.prod(meta.size):
            raise UsageError(f"{self.folder} does not hold all of {name}.")
        return meta

    def _object(self, name: str) -> Any:
        with self._told(name):
            return _load_inert(io.BytesIO(self._mapped(MetadataIndex(name))))

    def _piece(self, item: ReadItem) -> torch.Tensor:
        """Return what an item reads of a saved piece of a tensor."""
        with self._told(item.storage_index.fqn):
            entry = self._mapped(item.storage_index)
            stand_in = self._stand_in(item.storage_index)
            storage = stand_in.untyped_storage()
            start: int = storage._checkpoint_offset  # type: ignore[assignment]
            # Entries start anywhere, so the data may not be aligned; CPUs do not mind.
            data = torch.frombuffer(entry[start : start + storage.nbytes()], dtype=stand_in.dtype)
            piece = data.as_strided(stand_in.shape, stand_in.stride(), stand_in.storage_offset())
            return _narrow(piece, item.storage_offsets, item.lengths)

    def _stand_in(self, index: MetadataIndex) -> torch.Tensor:
        """Return a piece without data (on `meta`); its storage tells where in the entry that is."""
        stored = self._metadata.storage_data[index]
        with (self.folder / stored.relative_path).open("rb") as file:
            entry: Any = _create_file_view(file, stored.offset, stored.length)
            return torch.load(entry, map_location="meta", weights_only=True)

    def _mapped(self, index: MetadataIndex) -> memoryview:
        """Return the bytes of one entry, which `torch.save` wrote, mapped from its file.

        Raises:
            EOFError: the file ends before the entry does.
            UsageError: the bytes were saved through an extension, such as a compression.
        """
        stored = self._metadata.storage_data[index]
        if stored.transform_descriptors:
            raise UsageError(f"it is saved with {', '.join(stored.transform_descriptors)}")
        skipped = stored.offset % mmap.ALLOCATIONGRANULARITY
        with (self.folder / stored.relative_path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < stored.offset + stored.length:
                raise EOFError(f"{stored.relative_path} has {size} bytes, it ends too early")
            # A private mapping, since PyTorch has no tensors that cannot be written to.
            mapped = mmap.mmap(
                file.fileno(),
                skipped + stored.length,
                access=mmap.ACCESS_COPY,
                offset=stored.offset - skipped,
            )
        return memoryview(mapped)[skipped:]

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        try:
            yield
        except DAMAGED as error:
            reason = (str(error) or "it ends too early").partition("\n")[0]
            raise UsageError(f"{name} in {self.folder} cannot be read: {reason}") from error


def _narrow(tensor: torch.Tensor, offsets: Iterable[int], lengths: Iterable[int]) -> torch.Tensor:
    for dim, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor


def _read_metadata(folder: Path) -> Metadata:
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            return _MetadataUnpickler(file).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise UsageError(f"{path} cannot be read: {error}") from error


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the metadata classes of `torch.distributed.checkpoint` and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in METADATA_CLASSES.get(module, "").split():
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no metadata")
        return super().find_class(module, name)


class _Inert:
    """Stands for any class or function that a file names."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def _load_inert(file: io.BytesIO) -> Any:
    """Load plain data and Namespaces; every other class becomes `_Inert`.

    The run's arguments refer to enumerations of Megatron's, which would have to be imported.

    Raises:
        UsageError: the file is damaged, or names what PyTorch never accepts (`os`, `sys`).
    """
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        file.seek(0)
        stand_ins: list[Any] = [(_Inert, name) for name in foreign if name != "argparse.Namespace"]
        with torch.serialization.safe_globals([Namespace, *stand_ins]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UsageError("The checkpoint's arguments are damaged, or not data alone.") from error
