"""What a teacher must be, looked at and tried on a few tokens when it is loaded."""

from pathlib import Path
from typing import Any

import torch

from megatron_let.errors import UsageError
from megatron_let.hugging_face import open_safetensors, told
from megatron_let.teacher.load import CHOOSE
from megatron_let.teacher.stage import forward

LARGEST = 1e6
"""No weight of a trained model is that large."""
LENGTH = 16
CAUSAL, APART = (1e-4, 1e-2), (1e-3, 5e-2)
"""Largest relative differences of a token's states, in float32 and in half precision: between rows
of a batch, which no kernel should tell apart, and between two kernels of attention."""


def check_weights(model: Any, name: str) -> None:
    """Refuse weights that no training leaves behind: raises UsageError, which names one.

    `name` is the folder or hub id of `model`, a causal language model of transformers.
    """
    names = dict(model.named_parameters())
    way_out = "Export or download the model again, or choose another teacher."
    for path in sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else ():
        with open_safetensors(path) as file:
            for key in file.keys():  # noqa: SIM118, it is no dict
                kind = file.get_slice(key).get_dtype()
                if "F" not in kind and any(own.endswith(key) for own in names):
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
def check_documents(base_model: Any, vocab_size: int, length: int, name: str) -> None:
    """Read two documents of one row kept apart, and the second alone: its states are the same.

    A window of attention shows only where the row's `length` is larger. Raises UsageError if the
    states are not the same, or the model cannot be told.
    """
    cannot = (
        f"--teacher-model {name} cannot keep documents apart inside a row, as "
        "--reset-attention-mask has the student do"
    )
    weight, begin = next(base_model.parameters()), length // 2
    tokens_BS = _tokens(length, vocab_size).to(weight.device)
    position_ids = torch.arange(length, device=weight.device)[None]
    later = torch.ones(length, length, dtype=torch.bool, device=weight.device).triu(1)
    later[begin:, :begin] = True
    rows = {"tokens": tokens_BS, "position_ids": position_ids, "attention_mask": later[None, None]}
    alone = {"tokens": tokens_BS[:, begin:], "position_ids": position_ids[:, begin:]}
    with told(name, f"{cannot}."):
        apart = forward(base_model, rows)[0, begin:].float()
        moved = _differences(apart, forward(base_model, alone)[0].float()).max()
    if not moved < APART[weight.dtype is not torch.float32]:
        raise UsageError(
            f"{cannot}: is it recurrent? Choose a Llama, Qwen, Mistral, Gemma or OPT, or leave "
            "the flag out."
        )


def _tokens(length: int, vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (1, length), generator=generator)


def _differences(one_SD: torch.Tensor, other_SD: torch.Tensor) -> torch.Tensor:
    """Of each token, relative."""
    return (one_SD - other_SD).norm(dim=-1) / one_SD.norm(dim=-1).clamp(min=1e-12)
