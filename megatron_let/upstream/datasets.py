"""Megatron's dataset of documents, which says what it cannot train on, and executes no file."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets import gpt_dataset

from megatron_let.errors import UsageError
from megatron_let.upstream.table import Redirect, alike, around, instead


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


def _load_index(path: str, **_: Any) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (EOFError, OSError, ValueError) as error:
        raise UsageError(
            f"{path} is no index of samples ({error}). Remove {Path(path).parent}: it is made anew."
        ) from error


@around
def _unless_built(compile_helpers: Callable[[], None]) -> None:
    """The wheel brings them and no makefile, so upstream's call would end the run."""
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        compile_helpers()


_UTILS = "megatron.core.datasets.utils"
_CACHED = "megatron.core.datasets.gpt_dataset megatron.core.datasets.blended_dataset"
PREBUILT_HELPERS = Redirect(_UTILS, "compile_helpers", _unless_built, "there is no makefile")
REDIRECTS = [
    PREBUILT_HELPERS,
    *alike(_CACHED, "safe_numpy_load", instead(_load_index), "takes some pickles for arrays"),
]
