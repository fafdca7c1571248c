"""Compares a converted model with the one it came from: the logits of both on the same text."""

import functools
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from megatron_let import hugging_face
from megatron_let.checkpoint.reader import Checkpoint
from megatron_let.conversion.checks import NOT_WEIGHTS, is_not_weight
from megatron_let.conversion.safetensors_files import SafetensorsReader
from megatron_let.conversion.tokenizer_files import load_tokenizer
from megatron_let.errors import UsageError
from megatron_let.hugging_face import has_tokenizer

TEXT = """The first ships to cross the ocean under steam carried sails as well, for no engineer of
the day would promise that the coal would last. By 1840 the question was settled: a paddle steamer
of 703 tons reached the harbour in 14 days, with a third of her fuel unburnt. Who pays for the
empty hold on the way back? "Nobody", wrote the owner, "and that is the whole of my arithmetic."
"""
MAX_TOKENS = 128
TOLERANCE = 1e-5
"""Of the largest difference, in units of the largest logit; float32 on both sides."""


@dataclass(frozen=True)
class Difference:
    """How far two sets of logits are apart."""

    largest: float
    largest_logit: float
    relative: float
    """The largest difference over the largest logit."""
    tokens: int
    same_choice: float
    """Share of positions with the same likeliest token."""

    def __str__(self) -> str:
        return (
            f"logits on {self.tokens} tokens: largest difference {self.largest:.1e} "
            f"({self.relative:.1e} of the largest logit, {self.largest_logit:.3g}), same choice at "
            f"{100 * self.same_choice:.1f} % of the positions"
        )


def compare(ours_BSV: torch.Tensor, theirs_BSV: torch.Tensor) -> Difference:
    """Measure two models' logits on the same tokens; of zeros alone nothing can be said."""
    largest = (ours_BSV - theirs_BSV).abs().max().item()
    if (logit := theirs_BSV.abs().max().item()) == 0:
        raise UsageError("Not verified: all logits are zero, as of a model that was not trained.")
    same = (ours_BSV.argmax(-1) == theirs_BSV.argmax(-1)).float().mean().item()
    return Difference(largest, logit, largest / logit, ours_BSV.shape[:2].numel(), same)


@torch.no_grad()
def verify(checkpoint: Path, folder: Path) -> Difference:
    """Compare what Megatron and transformers compute, in float32 on CPU.

    `checkpoint` is one iteration's folder, as `find_checkpoint` returns it. Both hold the whole
    model in memory, one after the other; Megatron runs in a process of its own. A UsageError tells
    of a difference over `TOLERANCE`.
    """
    model = hugging_face.load(AutoModelForCausalLM, folder, dtype=torch.float32)
    # What a cast has lost on one side, the other loses here.
    files = SafetensorsReader(folder, model.base_model_prefix)
    own = _widest(files, files.names & model.state_dict().keys())
    saved = Checkpoint(checkpoint)
    theirs = _widest(saved, {n for n in saved.names if not is_not_weight(n, NOT_WEIGHTS)})
    for parameter in model.parameters():
        parameter.data = parameter.data.to(theirs).float()
    ids_BS = _token_ids(folder, model.config)
    ours_BSV = model(ids_BS).logits
    del model
    # Rows that only pad the vocabulary have no counterpart.
    theirs_BSV = _megatron_logits(checkpoint, ids_BS, own)[..., : ours_BSV.shape[-1]]
    difference = compare(ours_BSV, theirs_BSV)
    if not difference.relative <= TOLERANCE:  # a NaN is refused, too
        raise UsageError(
            f"{folder} and {checkpoint} do not compute the same: {difference}. Tolerance: "
            f"{TOLERANCE:.0e} of the largest logit. Do not use this conversion."
        )
    return difference


def _widest(tensors: Checkpoint | SafetensorsReader, names: Iterable[str]) -> torch.dtype:
    """The type that holds every stored value, whatever a configuration says."""
    return functools.reduce(torch.promote_types, (tensors.empty(name).dtype for name in names))


def _token_ids(folder: Path, config: Any) -> torch.Tensor:
    """Ids `[1, s]` of real text; random ones for a model without a tokenizer."""
    if has_tokenizer(folder):
        ids_BS = text_ids(TEXT, load_tokenizer(folder), config, MAX_TOKENS)
        if ids_BS.numel():  # a tokenizer of another script may leave nothing
            return ids_BS
    generator = torch.Generator().manual_seed(0)
    length = min(MAX_TOKENS, config.max_position_embeddings)
    return torch.randint(config.vocab_size, (1, length), generator=generator)


def text_ids(text: str, tokenizer: Any, config: Any, most: int) -> torch.Tensor:
    """Ids `[1, s]` of a text, as far as a model reads; a tokenizer may have more ids than rows."""
    ids = tokenizer(text)["input_ids"][: min(most, config.max_position_embeddings)]
    return torch.tensor([ids], dtype=torch.long) % config.vocab_size


def _megatron_logits(
    checkpoint: Path, ids_BS: torch.Tensor, rounded_to: torch.dtype
) -> torch.Tensor:
    with tempfile.TemporaryDirectory() as folder:
        tokens, logits = Path(folder) / "tokens.npy", Path(folder) / "logits.npy"
        np.save(tokens, ids_BS.numpy())
        words = (checkpoint.absolute(), tokens, logits, str(rounded_to).removeprefix("torch."))
        program = [sys.executable, "-m", "megatron_let.conversion.megatron_logits"]
        command = [*program, *map(str, words)]
        root = Path(__file__).resolve().parents[2]
        result = subprocess.run(command, capture_output=True, text=True, cwd=root)
        if result.returncode != 0:
            lines = result.stderr.strip().splitlines() or ["no message"]
            raise UsageError(f"Megatron cannot run {checkpoint}: {lines[-1]}")
        return torch.from_numpy(np.load(logits, allow_pickle=False))
