"""What a teacher must be, looked at and tried on a few tokens when it is loaded."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_let.errors import UsageError
from megatron_let.hugging_face import open_safetensors, told, weight_files
from megatron_let.teacher.load import CHOOSE
from megatron_let.teacher.stage import forward

LARGEST = 1e6
"""No weight of a trained model is that large."""
TRAINED = "F16 BF16 F32 F64 float16 bfloat16 float32 float64".split()
"""What numbers are called in safetensors and by PyTorch."""
LENGTH = 16
CAUSAL, APART = (1e-4, 1e-2), (1e-3, 5e-2)
"""Largest relative differences of a token's states, in float32 and in half precision: between rows
of a batch, which no kernel should tell apart, and between two kernels of attention."""


def check_weights(model: Any, name: str, revision: str | None = None) -> None:
    """Refuse weights that no training leaves behind: raises UsageError, which names one.

    `name` is the folder or hub id of `model`, a causal language model of transformers.
    """
    names = dict(model.named_parameters())
    way_out = "Export or download the model again, or choose another teacher."
    for path in weight_files(name, revision):
        # Their scales, too, transformers reads where the configuration tells of them.
        config = path.parent / "config.json"
        scaled = config.is_file() and b'"quantization_config"' in config.read_bytes()
        for key, kind in _kinds(path):
            is_weight = key.endswith(".weight") or any(own.endswith(key) for own in names)
            if is_weight and kind not in TRAINED and not (scaled and kind.startswith("F8")):
                raise UsageError(
                    f"--teacher-model {name} has {key} as {kind}: it is quantized, and would "
                    "be read as if it were not. Choose the model in full precision."
                )
    for key, weight in names.items():
        low, high = (bound.item() for bound in weight.aminmax())
        if not max(-low, high) < LARGEST:
            raise UsageError(f"--teacher-model {name} has {key} from {low} to {high}. {way_out}")
    if not model.get_input_embeddings().weight.any():
        raise UsageError(f"--teacher-model {name} has an embedding of zeros. {way_out}")


def _kinds(path: Path) -> Iterator[tuple[str, str]]:
    """Each tensor of a file of weights, and what its numbers are called."""
    if path.suffix == ".safetensors":
        with open_safetensors(path) as file:
            for key in file.keys():  # noqa: SIM118, it is no dict
                yield key, file.get_slice(key).get_dtype()
    else:
        mapped = zipfile.is_zipfile(path)  # older ones cannot be
        found = torch.load(path, map_location="meta", weights_only=True, mmap=mapped)
        for key, value in found.items():
            if isinstance(value, torch.Tensor):
                yield key, str(value.dtype).removeprefix("torch.")


@torch.no_grad()
def check_states(base_model: Any, vocab_size: int, name: str) -> None:
    """Change the second half of a row: no state of the first may move, and the others must.

    Raises UsageError if the model sees later tokens, or no token at all.
    """
    weight = next(base_model.parameters())
    tokens_BS = _tokens(LENGTH, vocab_size).repeat(2, 1).to(weight.device)
    half = LENGTH // 2
    tokens_BS[1, half:] = (tokens_BS[1, half:] + 1) % vocab_size
    with told(name, f"--teacher-model {name} cannot be run."):
        one, other = forward(base_model, {"tokens": tokens_BS}).float()
    if not one.isfinite().all():
        raise UsageError(f"--teacher-model {name} has states that are not finite: it is damaged.")
    moved = _differences(one, other)
    if moved[:half].max() > CAUSAL[weight.dtype is not torch.float32]:
        raise UsageError(
            f"--teacher-model {name} is not causal: its states know of later tokens, and the "
            f"student would learn to read ahead. {CHOOSE}"
        )
    if not moved[half:].max() > 0:
        raise UsageError(f"--teacher-model {name} has the same states whatever it reads.")


@torch.no_grad()
def check_documents(base_model: Any, vocab_size: int, length: int, name: str) -> bool:
    """Read a row as one document and as two, with a mask and without, the second alone.

    The states are the same, with the configuration's window of attention in the mask (then returns
    True), or without it, which some models ignore. It shows only where the row's `length` is
    larger. Raises UsageError if neither gives the same, or the model cannot be told.
    """
    cannot = (
        f"--teacher-model {name} cannot keep documents apart inside a row, as "
        "--reset-attention-mask has the student do"
    )
    weight, begin = next(base_model.parameters()), length // 2
    tokens_BS = _tokens(length, vocab_size).to(weight.device)
    position_ids = torch.arange(length, device=weight.device)[None]
    later = torch.ones(length, length, dtype=torch.bool, device=weight.device).triu(1)
    apart = later.clone()
    apart[begin:, :begin] = True
    rows = {"tokens": tokens_BS, "position_ids": position_ids}
    alone = {"tokens": tokens_BS[:, begin:], "position_ids": position_ids[:, begin:]}
    moved = {}
    with told(name, f"{cannot}."):
        whole, second = (forward(base_model, read)[0] for read in ({"tokens": tokens_BS}, alone))
        for windowed in (True, False):
            one, two = (
                forward(base_model, rows | {"attention_mask": mask[None, None]}, windowed)[0]
                for mask in (later, apart)
            )
            off_S = _differences(torch.cat([one, two[begin:]]), torch.cat([whole, second]))
            moved[windowed] = off_S.max().item()
    if not min(moved.values()) < APART[weight.dtype is not torch.float32]:
        raise UsageError(
            f"{cannot}: is it recurrent, or does it attend within chunks? Choose a Llama, Qwen, "
            "Mistral, Gemma or OPT, or leave the flag out."
        )
    return not moved[False] < moved[True] / 2  # two kernels' noise decides nothing


def _tokens(length: int, vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (1, length), generator=generator)


def _differences(one_SD: torch.Tensor, other_SD: torch.Tensor) -> torch.Tensor:
    """Of each token, relative."""
    one_SD, other_SD = one_SD.float(), other_SD.float()
    return (one_SD - other_SD).norm(dim=-1) / one_SD.norm(dim=-1).clamp(min=1e-12)
