"""Which samples of a training stream a run sees first: SALT_DS (arXiv 2410.18779, section 4).

A selection names samples of one stream (data, order, seed, length); a run uses them in their own
order for its first steps, and the stream itself from then on.
"""

import hashlib
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from megatron_let.errors import UsageError
from megatron_let.files import whole_file

MIN_KEPT = 0.1
"""Part of a sample's tokens that the scorer must have among its guesses; others score last."""


@dataclass(frozen=True)
class Selection:
    """Samples chosen of the first `candidates` of a stream."""

    data: str
    """Megatron's hash of the stream."""
    candidates: int
    samples: np.ndarray
    """Their indices `[n]`, ascending."""
    flops: float
    """What scoring all candidates cost."""
    beyond_reach: int
    """Of the samples, those that were chosen for lack of ones within the scorer's reach."""

    @property
    def digest(self) -> str:
        """By which its samples are known."""
        return hashlib.sha256(self.samples.tobytes()).hexdigest()[:12]

    def check(self, data: str) -> None:
        """Raise UsageError if its stream is not the one of the hash `data`."""
        if self.data != data:
            raise UsageError(
                "--kd-selection was made from other training data, another order or another length "
                f"({self.data[:12]}) than this run's ({data[:12]}). Make it anew with the flags of "
                "this run: megatron-let select."
            )

    def save(self, path: Path) -> None:
        """Write it as an .npz file, which appears whole or not at all."""
        with whole_file(path) as file:
            np.savez(file, **vars(self))


def load_selection(path: Path) -> Selection:
    """Read a selection; UsageError if there is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            values = {name: value if value.ndim else value.item() for name, value in file.items()}
            return Selection(**values)
    except (OSError, EOFError, ValueError, TypeError, AttributeError, BadZipFile) as error:
        raise UsageError(
            f"--kd-selection {path} is no selection ({error}). Make one: megatron-let select "
            "with the flags of this run."
        ) from error


def number_wanted(args: Namespace) -> int:
    """Samples that a run's distillation uses; UsageError if its flags do not tell."""
    if args.kd_stop_step is None or args.step_batch_size_schedule is not None:
        raise UsageError(
            "A selection is for the first steps of --method salt with one --global-batch-size: "
            "give the flags of such a run."
        )
    return args.kd_stop_step * args.global_batch_size


class SelectedFirst(torch.utils.data.Dataset):
    """A training stream whose first `number` are `samples` of it, again and again if fewer."""

    def __init__(self, dataset: Any, samples: np.ndarray, number: int) -> None:
        self.dataset, self.samples, self.number = dataset, samples, number

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if index < self.number:
            index = int(self.samples[index % len(self.samples)])
        return self.dataset[index]


def difficulty_B(
    logits_BSV: torch.Tensor, labels_BS: torch.Tensor, mask_BS: torch.Tensor, top_k: int
) -> torch.Tensor:
    """Median loss in nats of the tokens that are hard but within reach, for each sample.

    `median{ -log p(x_t) : x_t among the top_k likeliest }` over the loss's tokens (equation 10);
    minus infinity where fewer than `MIN_KEPT` of them are.
    """
    true_BS1 = logits_BSV.gather(-1, labels_BS[..., None])
    is_token = mask_BS > 0
    kept = ((logits_BSV > true_BS1).sum(-1) < top_k) & is_token
    losses = logits_BSV.logsumexp(-1) - true_BS1[..., 0]
    medians = losses.masked_fill(~kept, torch.nan).nanmedian(-1).values
    enough = kept.sum(-1) >= MIN_KEPT * is_token.sum(-1).clamp(min=1)
    return medians.where(enough, -torch.inf)


def highest(scores: np.ndarray, number: int) -> np.ndarray:
    """Indices of the `number` highest scores, ascending; of equal ones the earlier."""
    return np.sort(np.argsort(-scores, kind="stable")[:number])
