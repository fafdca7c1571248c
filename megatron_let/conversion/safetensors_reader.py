"""Reads the weights of a Hugging Face folder, a tensor at a time, from safetensors only."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from megatron_let.conversion.safetensors_folder import DTYPE_NAMES
from megatron_let.errors import UsageError
from megatron_let.hugging_face import check_folder, open_safetensors, weight_map

OUTPUT_LAYERS = ("lm_head.weight", "embed_out.weight")
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class SafetensorsReader:
    """The tensors of `model.safetensors`, or of the files that its index names.

    Args:
        folder: a Hugging Face model.
        base: the prefix of the model inside the causal one, which some older folders leave out.

    Raises:
        UsageError: there are no such files, or one is missing or damaged.
    """

    def __init__(self, folder: Path, base: str) -> None:
        self.folder = folder
        check_folder(folder)
        files = _weight_map(folder)
        # GPT-2's own folder has `h.0...` where transformers writes `transformer.h.0...`.
        complete = any(name.startswith(f"{base}.") for name in files)
        self._names = {
            name if complete or name in OUTPUT_LAYERS else f"{base}.{name}": name for name in files
        }
        self._files = files

    @property
    def names(self) -> set[str]:
        """Names of all tensors, as transformers has them."""
        return set(self._names)

    def empty(self, name: str) -> torch.Tensor:
        """Return a tensor without data (on `meta`) of the saved one's shape and type."""
        with self._file(name) as file, self._told(name):
            entry = file.get_slice(self._names[name])
            kind, shape = entry.get_dtype(), entry.get_shape()
        if kind not in DTYPES:
            raise UsageError(
                f"{name} in {self.folder} has the type {kind}; only {', '.join(DTYPES)} can be "
                "converted."
            )
        return torch.empty(shape, dtype=DTYPES[kind], device="meta")

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor."""
        with self._file(name) as file, self._told(name):
            return file.get_tensor(self._names[name])

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        try:
            yield
        except SafetensorError as error:
            raise UsageError(f"{name} in {self.folder} cannot be read: {error}") from error

    def _file(self, name: str) -> Any:
        """Open the tensor's file; one left open keeps all that was read of it in memory."""
        return open_safetensors(self.folder / self._files[self._names[name]])


def _weight_map(folder: Path) -> dict[str, str]:
    """Return each tensor's file."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return weight_map(index)
    single = folder / "model.safetensors"
    if single.is_file():
        with open_safetensors(single) as file:
            return dict.fromkeys(file.keys(), single.name)
    raise UsageError(
        f"{folder} holds no model.safetensors and no index of such files. Weights in other formats "
        "are not read: load the model with transformers and save it with save_pretrained."
    )
