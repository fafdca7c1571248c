"""Writes `model-*.safetensors` tensor by tensor, so that a model never has to fit in memory.

A file is eight bytes with the length of its header, the header (JSON: each tensor's type, shape and
place), and the tensors' bytes one after the other (github.com/huggingface/safetensors, "Format").
The library itself writes whole files from memory.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
HEADER_ALIGNMENT = 8
PIECE_BYTES = 256 * 1024
"""Written at once. Larger pieces make the page cache ask for large pages, which a virtual machine
may have given back to its host: ten times slower there (docs/benchmarks.md, "Conversion")."""


class SafetensorsFolder:
    """Files of fixed content that take their tensors in any order.

    Args:
        folder: where to write; it must exist.
        tensors: of every tensor the name and a stand-in (on `meta`) with its shape and type.
        max_shard_size: largest size of a file, such as "5GB"; a larger tensor has one of its own.

    Use it as a context: leaving it checks that every tensor was written.
    """

    def __init__(
        self, folder: Path, tensors: Mapping[str, torch.Tensor], max_shard_size: str
    ) -> None:
        self._tensors = tensors
        self._missing = set(tensors)
        self._place: dict[str, tuple[int, int]] = {}
        """File descriptor and offset of each tensor."""
        self._descriptors: list[int] = []
        plan = split_state_dict_into_shards_factory(
            dict(tensors),
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        for name, members in plan.filename_to_tensors.items():
            self._open(folder / name, members)
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True)
            (folder / "model.safetensors.index.json").write_text(text + "\n")

    def _open(self, path: Path, names: list[str]) -> None:
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            stand_in = self._tensors[name]
            start, end = end, end + stand_in.nbytes
            entries[name] = {
                "dtype": DTYPE_NAMES[stand_in.dtype],
                "shape": list(stand_in.shape),
                "data_offsets": [start, end],
            }
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % HEADER_ALIGNMENT)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._descriptors.append(descriptor)
        _write(descriptor, 0, len(header).to_bytes(8, "little") + header)
        offset = 8 + len(header)
        os.truncate(descriptor, offset + end)
        for name in names:
            self._place[name] = descriptor, offset
            offset += self._tensors[name].nbytes

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, in the type that was announced.

        Raises:
            ValueError: it has another shape than was announced, or was written before.
        """
        stand_in = self._tensors[name]
        if tensor.shape != stand_in.shape or name not in self._missing:
            raise ValueError(f"{name} {tuple(tensor.shape)} is not what is left to be written")
        self._missing.remove(name)
        data = tensor.to(stand_in.dtype).contiguous().view(-1).view(torch.uint8)
        descriptor, offset = self._place[name]
        _write(descriptor, offset, data.numpy().data)

    def __enter__(self) -> "SafetensorsFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for descriptor in self._descriptors:
            if kind is None:
                os.fsync(descriptor)
            os.close(descriptor)
        assert kind is not None or not self._missing, sorted(self._missing)


def _write(descriptor: int, offset: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view[:PIECE_BYTES], offset)
        view, offset = view[written:], offset + written
