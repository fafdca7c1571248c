"""The weights of a Hugging Face folder, read and written a tensor at a time, as safetensors only.

A file is eight bytes with the length of its header, the header (JSON: each tensor's type, shape and
place), and the tensors' bytes one after the other (github.com/huggingface/safetensors, "Format").
The library reads single tensors, but writes whole files from memory.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from transformers import GenerationConfig

from megatron_let.conversion import rope
from megatron_let.conversion.checks import check_finite
from megatron_let.conversion.output import PiecewiseFile
from megatron_let.errors import UsageError
from megatron_let.hugging_face import check_folder, open_safetensors, weight_files

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
OUTPUT_LAYERS = ("lm_head.weight", "embed_out.weight")
INDEX = "model.safetensors.index.json"


class SafetensorsReader:
    """The tensors of those files of a model's folder that transformers reads.

    `base` is the prefix of the model inside the causal one, which some older folders leave out.
    """

    def __init__(self, folder: Path, base: str) -> None:
        self.folder = folder
        check_folder(folder)
        self._files: dict[str, Path] = {}
        for path in weight_files(str(folder)):
            if path.suffix == ".safetensors":
                with open_safetensors(path) as file:
                    self._files |= dict.fromkeys(file.keys(), path)
        if not self._files:
            raise UsageError(
                f"{folder} holds no model.safetensors with weights, and no index of such files. "
                "Weights in other formats are not read: load the model with transformers and save "
                "it with save_pretrained."
            )
        # GPT-2's own folder has `h.0...` where transformers writes `transformer.h.0...`.
        prefix = "" if any(name.startswith(f"{base}.") for name in self._files) else f"{base}."
        self._names = {
            name if name in OUTPUT_LAYERS else prefix + name: name for name in self._files
        }

    @property
    def names(self) -> set[str]:
        """Names of all tensors, as transformers has them."""
        return set(self._names)

    def empty(self, name: str) -> torch.Tensor:
        """Return a tensor without data (on `meta`) of the saved one's shape and type."""
        entry = self._get(name, "get_slice")
        dtype = entry.get_dtype()
        if dtype not in DTYPES:
            only = f"only {', '.join(DTYPES)} can be converted"
            raise UsageError(f"{name} in {self.folder} has the type {dtype}; {only}.")
        return torch.empty(entry.get_shape(), dtype=DTYPES[dtype], device="meta")

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor; a UsageError if a value is NaN or infinite."""
        return check_finite(f"{name} in {self.folder}", self._get(name, "get_tensor"))

    def _get(self, name: str, method: str) -> Any:
        saved = self._names[name]
        # A file left open keeps all that was read of it in memory.
        with open_safetensors(self._files[saved]) as file:
            try:
                return getattr(file, method)(saved)
            except SafetensorError as error:
                raise UsageError(f"{name} in {self.folder} cannot be read: {error}") from error


def check_shard_size(max_shard_size: str) -> None:
    """Refuse what is no size."""
    if not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", max_shard_size):
        raise UsageError(f"--max-shard-size {max_shard_size} is not a size such as 5GB or 500MB.")


def write_folder(
    folder: Path,
    model: Any,
    tensors: Mapping[str, torch.Tensor],
    weights: Iterable[tuple[str, torch.Tensor]],
    max_shard_size: str,
) -> None:
    """Write a folder that transformers loads, without the model ever being in memory.

    `model` is on `meta`, as are `tensors`, stand-ins with the shapes and the type to write, and
    `weights` gives every tensor once, in their order. One larger than `max_shard_size`, such as
    "5GB", has a file of its own.
    """
    model.config.architectures = [type(model).__name__]
    model.config.dtype = next(iter(tensors.values())).dtype
    model.config.save_pretrained(folder)
    positions = getattr(model.config, "rope_parameters", None) or {}
    if "rope_theta" in positions:
        path = folder / "config.json"
        fields = json.loads(path.read_bytes()) | rope.older_names(positions)
        path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    GenerationConfig.from_model_config(model.config).save_pretrained(folder)
    plan = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    with contextlib.ExitStack() as stack:
        files = {}
        for filename, names in plan.filename_to_tensors.items():
            files[filename] = stack.enter_context(PiecewiseFile(folder / filename, "xb"))
            files[filename].write(_header({name: tensors[name] for name in names}))
        for (name, stand_in), (given, tensor) in zip(tensors.items(), weights, strict=True):
            assert (given, tensor.shape) == (name, stand_in.shape), given
            data = check_finite(name, tensor.to(stand_in.dtype)).contiguous().view(-1)
            files[plan.tensor_to_filename[name]].write(data.view(torch.uint8).numpy().data)
        for file in files.values():
            os.fsync(file.fileno())


def _header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """What a file begins with that has these tensors one behind the other."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        place = {"shape": list(tensor.shape), "data_offsets": [start, end]}
        entries[name] = {"dtype": DTYPE_NAMES[tensor.dtype]} | place
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # aligned
    return len(header).to_bytes(8, "little") + header
