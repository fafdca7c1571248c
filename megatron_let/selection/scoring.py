"""Score the first samples of a run's training stream and keep the best: `megatron-let select`."""

import hashlib
import itertools
import math
import shutil
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.training import get_tokenizer
from tqdm import tqdm

from megatron_let.data.selection import Selection, difficulty_B, highest, number_wanted
from megatron_let.errors import UsageError
from megatron_let.files import whole_file
from megatron_let.teacher import load
from megatron_let.teacher.load import read_teacher_config, read_token_ids
from megatron_let.teacher.stage import Teacher, logits
from megatron_let.upstream.mended import known_token_ids

CHUNK = 256
"""Samples that one process scores at a stretch, and that an interrupted scoring loses at most."""


@dataclass(frozen=True)
class SelectConfig:
    """What is selected, and by whom; UsageError for a value that cannot be right."""

    output: Path
    keep_fraction: float
    """Kept of the candidates, above 0, at most 1."""
    scorer_model: str | None
    """Folder or hub id of the model that scores; None: at random, as a control."""
    top_k: int = 10
    dtype: str = "fp32"
    batch: int = 8
    """Samples in one forward pass."""

    def __post_init__(self) -> None:
        if not 0 < self.keep_fraction <= 1:
            raise UsageError(
                f"--keep-fraction {self.keep_fraction} must be above 0 and at most 1: the part of "
                "the scored samples that is kept."
            )
        if self.output.exists():
            raise UsageError(
                f"--output {self.output} exists, and nothing is overwritten. Choose another file."
            )
        self.output.parent.mkdir(parents=True, exist_ok=True)


def number_of_candidates(config: SelectConfig, args: Namespace, available: int) -> int:
    """Samples to score for what the run wants to keep; UsageError if it has not so many."""
    wanted = number_wanted(args)
    candidates = math.ceil(wanted / config.keep_fraction)
    if candidates > available:
        raise UsageError(
            f"--keep-fraction {config.keep_fraction} needs {candidates} samples to choose "
            f"{wanted} from, but the run has {available}. Keep at least "
            f"{math.ceil(1000 * wanted / available) / 1000}, or shorten --kd-stop-step."
        )
    return candidates


def select(config: SelectConfig, args: Namespace, dataset: Any) -> Selection | None:
    """Score the candidates on all ranks; write and return the selection on rank 0.

    A chunk is scored by one rank, whichever, and kept on disk: an interrupted call goes on.
    """
    candidates = number_of_candidates(config, args, len(dataset))
    parts: list[Path] = []
    flops = 0.0
    if config.scorer_model is not None:
        try:
            _check_tokens(config.scorer_model, args)
            scorer = Scorer(config.scorer_model, config, args.seq_length)
        except UsageError as error:  # of what loads teachers, too
            words = str(error).replace("--teacher-model", "--scorer-model")
            raise type(error)(words) from error
        parts, flops = _score_all(scorer, dataset, candidates), scorer.flops_per_sample * candidates
    if torch.distributed.get_rank() != 0:
        return None
    if missing := [part for part in parts if not part.exists()]:
        raise UsageError(
            f"{missing[0]} is not here: another node has it on a disk of its own. Give an --output "
            "on one that all nodes share."
        )
    if parts:
        scores = np.concatenate([np.load(part, allow_pickle=False) for part in parts])
    else:
        scores = np.random.default_rng(args.seed).random(candidates)
    samples = highest(scores, number_wanted(args))
    selection = Selection(
        data=dataset.unique_description_hash,
        candidates=candidates,
        samples=samples,
        flops=flops,
        beyond_reach=int(np.isinf(scores[samples]).sum()),
    )
    selection.save(config.output)
    if parts:
        shutil.rmtree(parts[0].parent)
    return selection


def _check_tokens(scorer: str, args: Namespace) -> None:
    """Raise UsageError if the scorer would read the run's tokens as others than they are."""
    student, ids = known_token_ids(args), read_token_ids(scorer)
    if student and ids:
        load.check_token_ids(student, ids, scorer, "--scorer-model")
    elif (rows := read_teacher_config(scorer).vocab_size) < (needed := get_tokenizer().vocab_size):
        raise UsageError(
            f"--scorer-model {scorer} has {rows} rows for the run's {needed} tokens: choose one "
            "of the same tokenizer."
        )


class Scorer:
    """A small model that scores samples."""

    def __init__(self, name: str, config: SelectConfig, seq_length: int) -> None:
        shape = read_teacher_config(name)
        self.config, self.context = config, shape.context
        self._device = torch.device(torch.cuda.current_device())
        self._model = load.load_causal_lm(shape, load.DTYPES[config.dtype], self._device)
        self.fingerprint = load.fingerprint(self._model)
        length = min(seq_length, shape.context)
        states = Teacher(self._model, shape.context).forward_flops(length, length)
        self.flops_per_sample = states + shape.head_flops_per_token * length

    @torch.no_grad()
    def score(self, samples: list[dict[str, Any]]) -> np.ndarray:
        """Scores of some samples; a longer sample is scored as far as the context reaches."""
        tokens, labels, mask = (
            torch.stack([torch.as_tensor(s[key])[: self.context] for s in samples]).to(self._device)
            for key in ("tokens", "labels", "loss_mask")
        )
        found = logits(self._model, tokens).float()
        if not found.amax(-1).isfinite().all():
            raise UsageError(
                "--scorer-model gives scores that are no numbers: it is damaged, or "
                f"--scorer-dtype {self.config.dtype} is too small for it."
            )
        return difficulty_B(found, labels, mask, self.config.top_k).double().cpu().numpy()


def _score_all(scorer: Scorer, dataset: Any, candidates: int) -> list[Path]:
    """Files with the scores of all candidates, in order, once every rank has scored its own."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    config, data = scorer.config, dataset.unique_description_hash
    settings = f"{config.top_k} {config.dtype} {scorer.context} {dataset.config.eod_mask_loss}"
    what = f"{data} {candidates} {scorer.fingerprint} {settings}"
    key = hashlib.sha256(what.encode()).hexdigest()[:12]
    # Scores that are there already, of this scorer and these samples.
    folder = config.output.with_name(f"{config.output.name}.parts-{key}")
    folder.mkdir(parents=True, exist_ok=True)
    files = {first: folder / f"{first:012d}.npy" for first in range(0, candidates, CHUNK)}
    mine = [first for first in list(files)[rank::ranks] if not files[first].exists()]
    for first in tqdm(mine, unit=f"x{CHUNK} samples", disable=None if rank == 0 else True):
        numbers = range(first, min(first + CHUNK, candidates))
        batches = itertools.batched(numbers, config.batch)
        scores = [scorer.score([dataset[number] for number in batch]) for batch in batches]
        with whole_file(files[first]) as file:
            np.save(file, np.concatenate(scores))
    torch.distributed.barrier()
    return list(files.values())
