"""Megatron's dataset of documents; what can't be trained on is told in a sentence."""

from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets import blended_dataset, gpt_dataset

from megatron_let.errors import UsageError

SAMPLES_LOOKED_AT = 8


class GPTDataset(gpt_dataset.GPTDataset):
    """Upstream's; of the same name, which is part of the keys of cached indices."""

    def _get_num_epochs(self, num_tokens_per_epoch: int) -> int:
        """Upstream counts epochs until there are enough tokens: of none, or of three, for ever."""
        if num_tokens_per_epoch <= self.config.sequence_length:
            raise UsageError(
                f"{self.dataset_path} holds {num_tokens_per_epoch} tokens for "
                f"{self.index_split.name}, which is no sample of --seq-length "
                f"{self.config.sequence_length}. Give more documents, or another --split; without "
                "validation: --eval-iters 0."
            )
        return super()._get_num_epochs(num_tokens_per_epoch)


def use_plain_indices() -> None:
    """Have Megatron load its cached indices as arrays alone; it takes some pickles for ones."""
    gpt_dataset.safe_numpy_load = blended_dataset.safe_numpy_load = _load_index


def _load_index(path: str, **_: Any) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (EOFError, OSError, ValueError) as error:
        raise UsageError(
            f"{path} is no index of samples ({error}). Remove {Path(path).parent}: it is made anew."
        ) from error


def check_loss_mask(dataset: Any) -> None:
    """Look at the first samples: their loss is 0/0 if no token of them counts.

    Raises:
        UsageError: none does.
    """
    samples = range(min(SAMPLES_LOOKED_AT, len(dataset)))
    if samples and not any(dataset[index]["loss_mask"].any() for index in samples):
        raise UsageError(
            f"No token of the first {len(samples)} samples counts in the loss: all are the "
            "tokenizer's padding, or, with --eod-mask-loss, its end of a document. Was the data "
            "made with this tokenizer?"
        )


def check_ids(ids: Any, rows: int, where: str) -> None:
    """Check that the embedding has a row for each token id of an array or a tensor.

    Raises:
        UsageError: naming the largest.
    """
    if len(ids) and (largest := int(ids.max())) >= rows:
        raise UsageError(
            f"{where} has the token id {largest}, and the model {rows} rows (the tokenizer's "
            "tokens, padded). Preprocess the data with this tokenizer."
        )
