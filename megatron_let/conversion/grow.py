"""Grows a small Hugging Face model into a larger shape: folder to folder, a layer at a time."""

import functools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from megatron_let import hugging_face
from megatron_let.conversion import configs, tokenizer_files
from megatron_let.conversion.from_hf import Source, open_model
from megatron_let.conversion.growth import Grown, Growth, Read, grown_config
from megatron_let.conversion.output import check_free, complete_or_absent
from megatron_let.conversion.safetensors_files import (
    SafetensorsReader,
    check_shard_size,
    write_folder,
)
from megatron_let.conversion.verify import TEXT, compare, text_ids
from megatron_let.errors import UsageError
from megatron_let.planning.shapes import from_hf_config
from megatron_let.teacher.load import DTYPES

MODEL_TYPES = ("llama", "qwen2")
TOLERANCE = 2e-5
"""Of exact growth: the largest difference of a logit, in units of the largest; float32."""
MAX_TOKENS, MAX_CHARACTERS = 1024, 65_536
AT_ONCE = 4
"""Tensors that are made, and held, at once."""


def open_small(flag: str, hf_model: str, revision: str | None = None) -> Source:
    """Open the model that is to be grown, which a flag names; refuse other families."""
    small = open_model(flag, hf_model, revision)
    if small.config.model_type not in MODEL_TYPES:
        raise UsageError(
            f"{flag} {hf_model} is a {small.config.model_type}: only {' and '.join(MODEL_TYPES)} "
            "can be grown. (LayerNorm subtracts a mean, norms in attention divide by one head's: "
            "neither goes on computing the same when features are added.)"
        )
    return small


def grown_model(small: Source, sizes: Mapping[str, Any], growth: Growth) -> tuple[Grown, Any, bool]:
    """Return the large model's tensors and configuration, and whether it computes the same.

    `sizes` are fields of `planning.shapes.ModelShape` that are not the small model's.
    """
    old = from_hf_config(small.config.to_dict(), name=str(small.folder))
    new = replace(old, name="the large model", **sizes)
    grown = Grown(small.reader.read, old, new, growth)  # first: it refuses what cannot be
    config = type(small.config)(**grown_config(small.config, new, growth))
    return grown, config, growth.is_exact(old, new)


def grow_model(
    hf_model: str,
    output: Path,
    sizes: Mapping[str, Any],
    growth: Growth,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    text: Path | None = None,
) -> str:
    """Write the large model, proven, or nothing at all; returns a sentence on what it computes.

    `sizes` are as `grown_model` takes them, or None for the small model's. `dtype` is a key of
    `DTYPES`, float32 if None, since the norms' weights are rounded otherwise. The loss of both
    models is told on `text`.
    """
    check_free(output)
    check_shard_size(max_shard_size)
    small = open_small("--hf-model", hf_model, revision)
    given = {name: size for name, size in sizes.items() if size is not None}
    grown, config, is_exact = grown_model(small, given, growth)
    is_exact = is_exact and dtype in (None, "fp32")
    has_tokenizer = hugging_face.has_tokenizer(small.folder)
    tokenizer = tokenizer_files.load_tokenizer(small.folder) if has_tokenizer else None
    text_BS = _read(text, tokenizer, small) if text or not is_exact else None
    model = configs.empty_model(config)
    state = model.to(DTYPES[dtype or "fp32"]).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    with complete_or_absent(output) as folder:
        names = tqdm(state, desc="weights", disable=None)
        weights = zip(state, _ahead(grown.read, names), strict=True)
        write_folder(folder, model, state, weights, max_shard_size)
        if tokenizer is not None:
            tokenizer_files.write_tokenizer(small.folder, tokenizer, folder)
        # What is written is proven, its rounding too, before it has its name.
        read = SafetensorsReader(folder, model.base_model_prefix).read
        return _compare(small, config, read, text_BS, exact=is_exact)


def _read(text: Path | None, tokenizer: Any, small: Source) -> torch.Tensor | None:
    """The tokens `[1, s]` that losses are told on; looked at before hours of work."""
    if tokenizer is not None:
        words = TEXT
        if text is not None:
            with text.open(errors="replace") as file:  # of a corpus the beginning
                words = file.read(MAX_CHARACTERS)
        ids_BS = text_ids(words, tokenizer, small.config, MAX_TOKENS)
        if ids_BS.numel() > 1:
            return ids_BS
    if text is not None:
        raise UsageError(f"--text {text} has no two tokens by a tokenizer in {small.folder}.")
    return None


def _ahead(read: Read, names: Iterable[str]) -> Iterator[torch.Tensor]:
    """The tensors in their order, some made at once: one's random numbers take one core."""
    workers = min(AT_ONCE, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        begun: deque[Future[torch.Tensor]] = deque()
        for name in names:
            begun.append(pool.submit(read, name))
            if len(begun) > workers:
                yield begun.popleft().result()
        yield from (future.result() for future in begun)


# --- the proof ---------------------------------------------------------------------------------


def _compare(
    small: Source, config: Any, read: Read, text_BS: torch.Tensor | None, *, exact: bool
) -> str:
    """Compare both models' logits on random tokens, and their losses on a text."""
    generator = torch.Generator().manual_seed(0)
    length = min(64, config.max_position_embeddings)
    ids_BS = torch.randint(config.vocab_size, (2, length), generator=generator)
    ours_BSV = streamed_logits(config, read, ids_BS)
    verdict = compare(ours_BSV, streamed_logits(small.config, small.reader.read, ids_BS))
    if exact and not verdict.relative <= TOLERANCE:  # a NaN is refused, too
        raise UsageError(
            f"{small.folder}, grown, computes something else: {verdict}, not "
            f"{TOLERANCE:.0e}. Please report the command."
        )
    if text_BS is None:
        return str(verdict)
    before, after = (
        F.cross_entropy(streamed_logits(c, r, text_BS)[0, :-1], text_BS[0, 1:]).item()
        for c, r in ((small.config, small.reader.read), (config, read))
    )
    return f"{verdict}; loss on {text_BS.numel()} tokens of text {before:.4f}, grown {after:.4f}"


@torch.no_grad()
def streamed_logits(config: Any, read: Read, ids_BS: torch.Tensor) -> torch.Tensor:
    """Return a model's logits `[B, S, V]` in float32 on CPU, with one layer in memory at a time."""
    model = configs.empty_model(config).eval()
    base = model.base_model
    base.rotary_emb = type(base.rotary_emb)(config)
    prefix = model.base_model_prefix
    parts = {f"{prefix}.layers.{i}": layer for i, layer in enumerate(base.layers)}
    parts |= {f"{prefix}.embed_tokens": base.embed_tokens, f"{prefix}.norm": base.norm}
    head = f"{prefix}.embed_tokens" if config.tie_word_embeddings else "lm_head"

    def fill(name: str, part: torch.nn.Module, *_: Any) -> None:
        weights = {key: read(f"{name}.{key}").float() for key in part.state_dict()}
        part.load_state_dict(weights, assign=True)

    def drop(part: torch.nn.Module, *_: Any) -> None:
        part.to("meta")

    for name, part in parts.items():
        part.register_forward_pre_hook(functools.partial(fill, name))
        part.register_forward_hook(drop)
    states_BSD = base(input_ids=ids_BS, use_cache=False).last_hidden_state
    return F.linear(states_BSD, read(f"{head}.weight").float())
