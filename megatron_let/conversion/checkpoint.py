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
import re
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


def step_name(step: int) -> str:
    """Return the name that Megatron gives the folder of an iteration."""
    return f"iter_{step:07d}"


def iteration_folders(load: Path) -> dict[int, Path]:
    """Return the checkpoints' folders in `load` by iteration, the newest last.

    Only a name that Megatron gives counts: `iter_0000005.mine` is its owner's.
    """
    named = {p.name.removeprefix("iter_"): p for p in load.glob("iter_*") if p.is_dir()}
    steps = {int(word): path for word, path in named.items() if word.isdecimal()}
    steps = {step: load / step_name(step) for step in sorted(steps)}
    return {step: path for step, path in steps.items() if path.name.removeprefix("iter_") in named}


def listed(load: Path) -> str:
    """Say which checkpoints a folder holds."""
    return ", ".join(path.name for path in iteration_folders(load).values()) or "none"


def is_finished(folder: Path) -> bool:
    """Whether a save came to its end, which is to write `metadata.json`.

    Raises:
        UsageError: it has another format than `torch_dist`, which might execute what it holds.
    """
    try:
        saved = json.loads((folder / "metadata.json").read_text())["sharded_backend"]
    except FileNotFoundError:
        saved = "torch" if any(folder.glob("mp_rank_*")) else None
    except (ValueError, KeyError, TypeError):
        saved = None
    if saved not in (None, "torch_dist"):
        raise UsageError(
            f"{folder} was saved with --ckpt-format {saved}; only torch_dist can be read. "
            "Megatron-LM's pretrain_gpt.py converts what you trust: --ckpt-convert-format."
        )
    return saved is not None


def find_checkpoint(load: Path, step: int | None = None) -> Path:
    """Return the folder of one checkpoint below `load` (`--save` of the run).

    Args:
        load: the folder that holds the `iter_` folders.
        step: the iteration to take; the newest that has all its bytes if None.

    Raises:
        UsageError: there is no such checkpoint, or it has another format than `torch_dist`.
    """
    folders = [*iteration_folders(load).values()][::-1] + [load / "release"]
    if step is not None:
        folders = [load / step_name(step)]
    problem: str | None = ""
    for folder in folders:
        if is_finished(folder) and (problem := cut(folder)) is None:
            return folder
    raise UsageError(
        f"No whole checkpoint at {load if step is None else folders[0]}. {problem} {load} holds: "
        f"{listed(load)}. Give the folder that was the run's --save, not an iter_ folder inside "
        "it; --ckpt-step chooses among those."
    )


def is_written(folder: Path) -> bool:
    """Whether one `torch_dist` checkpoint has all its files, by their sizes."""
    return (folder / "metadata.json").is_file() and cut(folder) is None


def cut(folder: Path) -> str | None:
    """Compare the files' sizes with what `.metadata` says of them; say what is wrong."""
    try:
        needed = stored_bytes(folder)
    except UsageError as error:
        return str(error)
    for name, size in needed.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size < size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
    return None


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

    def unreadable_state(self) -> str | None:
        """Say why a run could not read what it reads first, None if it can."""
        older = self.folder / OLDER_COMMON_STATE
        try:
            new = not older.exists()
            state = self._mapped(MetadataIndex(COMMON_STATE)) if new else older.read_bytes()
            torch.load(io.BytesIO(state), "cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # a damaged pickle can raise anything
            return f"the run's state cannot be read: {why(error)}"
        return None

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
            raise UsageError(f"{name} in {self.folder} cannot be read: {why(error)}") from error


def _narrow(tensor: torch.Tensor, offsets: Iterable[int], lengths: Iterable[int]) -> torch.Tensor:
    for dim, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor


def _read_metadata(folder: Path) -> Metadata:
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = MetadataUnpickler(file).load()
        for stored in metadata.storage_data.values():
            name = stored.relative_path
            if Path(name).name != name or min(stored.offset, stored.length) < 0:
                raise ValueError(f"it names no place in a file here: {name}")
    except Exception as error:  # a damaged pickle can raise anything
        if isinstance(error, OSError) and path.exists():
            raise  # the disk's fault
        raise UsageError(f"{path} cannot be read: {error}") from error
    return metadata


def why(error: BaseException) -> str:
    """Return in a few words why an entry cannot be loaded."""
    if named := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it names {named[1]}, which is no data"
    words = str(error).rpartition("WeightsUnpickler error: ")[2]
    return (words or "it ends too early").strip().partition("\n")[0]


class MetadataUnpickler(pickle.Unpickler):
    """Builds the metadata classes of `torch.distributed.checkpoint` and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse all other names."""
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
        # Not what is allowed already, as in Megatron: the end of `with` would forbid it for good.
        stand_ins: list[Any] = [
            (Namespace if name == "argparse.Namespace" else _Inert, name) for name in foreign
        ]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UsageError("The checkpoint's arguments are damaged, or not data alone.") from error
