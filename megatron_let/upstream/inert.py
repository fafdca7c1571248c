"""Readers of pickles that build data and nothing else."""

import io
import pickle
import re
from argparse import Namespace
from typing import Any

import torch

from megatron_let.errors import UsageError

METADATA_CLASSES = {
    "torch": "Size float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 "
    "int8 uint8 bool",
    "pathlib": "PosixPath",
    "torch.serialization": "_get_layout",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo _StoragePrefix",
    "torch.distributed.checkpoint.metadata": "Metadata MetadataIndex StorageMeta "
    "TensorStorageMetadata BytesStorageMetadata TensorProperties ChunkStorageMetadata "
    "_MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.planner": "SavePlan WriteItem WriteItemType TensorWriteData",
}
"""All that a `.metadata` file may name; it is a plain pickle."""


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


class Inert:
    """Stands for any class or function that a file names."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def load_inert(file: io.BytesIO) -> Any:
    """Load plain data and Namespaces; every other class becomes `Inert`.

    The run's arguments refer to enumerations of Megatron's, which would have to be imported. A
    damaged file, or one that names what PyTorch never accepts (`os`, `sys`), is a `UsageError`.
    """
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        file.seek(0)
        # Not what is allowed already, as in Megatron: the end of `with` would forbid it for good.
        stand_ins: list[Any] = [
            (Namespace if name == "argparse.Namespace" else Inert, name) for name in foreign
        ]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UsageError("The checkpoint's arguments are damaged, or not data alone.") from error
