"""Writes a run's checkpoint as a folder that `transformers.from_pretrained` loads.

It goes layer by layer from disk to disk: the largest thing in memory is one layer's matrix, or the
embedding.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from megatron_let import hugging_face
from megatron_let.checkpoint.folder import find_checkpoint
from megatron_let.checkpoint.reader import Checkpoint
from megatron_let.conversion import checks, configs, tokenizer_files
from megatron_let.conversion.output import check_free, complete_or_absent
from megatron_let.conversion.safetensors_files import check_shard_size, write_folder
from megatron_let.errors import UsageError
from megatron_let.teacher.load import DTYPES


def export(
    load: Path,
    output: Path,
    *,
    ckpt_step: int | None = None,
    tokenizer_model: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Write the model and its tokenizer; returns the folder, which appears complete or not at all.

    `load` is the run's `--save`; `output` must not exist, or be empty. Without `ckpt_step` it is
    the latest iteration, without `tokenizer_model` (folder or hub id) the run's own tokenizer, and
    without `dtype`, a key of `DTYPES`, the weights stay as saved.
    """
    check_shard_size(max_shard_size)
    check_free(output)
    checkpoint = Checkpoint(find_checkpoint(load, ckpt_step))
    args = checkpoint.args()
    family = configs.family_of_run(args)
    source = tokenizer_model or tokenizer_files.tokenizer_of_run(args)
    tokenizer = None if source is None else _tokenizer(source, args)
    shape = configs.model_shape(args, _rows(args, tokenizer))
    config = configs.hugging_face_config(family, args, shape, tokenizer)

    rules = checks.rules_of(family.rules, tied=config.tie_word_embeddings)
    what = f"the checkpoint, by its arguments a {family.name},"
    wanted = [rule.megatron for rule in rules]
    checks.check_names(wanted, checkpoint.names, what, checks.NOT_WEIGHTS)

    def stand_in(name: str, layer: int | None) -> torch.Tensor:
        tensor = checkpoint.empty(name)
        if layer is not None and len(tensor) != shape.num_layers:
            raise UsageError(f"{name} stacks {len(tensor)} layers; the run had {shape.num_layers}.")
        return (tensor if layer is None else tensor[0]).to(DTYPES[dtype] if dtype else tensor.dtype)

    def converted(read: Callable[..., torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        for rule, layer in checks.pieces(rules, shape):
            yield from rule.split(read(rule.megatron, layer), layer, shape)

    tensors = dict(converted(stand_in))
    model = configs.empty_model(config)
    checks.check_shapes(tensors, model.state_dict(), "the run's arguments make")
    weights = tqdm(converted(checkpoint.read), "weights", len(tensors), disable=None)
    with complete_or_absent(output) as folder:
        write_folder(folder, model, tensors, weights, max_shard_size)
        if source is not None:
            tokenizer_files.write_tokenizer(source, tokenizer, folder)
    return output


def _tokenizer(source: str, args: Namespace) -> Any:
    way_out = " Give the run's with --tokenizer-model."
    tokenizer = tokenizer_files.load_tokenizer(source, way_out)
    # Megatron adds them to what it loads.
    tokenizer.add_tokens(vars(args).get("special_tokens") or [], special_tokens=True)
    tokenizer_files.check_tokenizer(args, tokenizer, source)
    return tokenizer


def _rows(args: Namespace, tokenizer: Any) -> int:
    """Of the embedding, for all ids; a model that came with more rows than tokens keeps them."""
    ids = {} if tokenizer is None else tokenizer.get_vocab()
    rows = max(vars(args).get("vocab_size") or 0, *(index + 1 for index in ids.values()), 0)
    if vars(args).get("tokenizer_fingerprint") is not None:
        rows = min(rows, args.padded_vocab_size)  # its own tokenizer, of an import with fewer rows
    return rows


def sample(folder: Path, prompt: str) -> str:
    """Return what an exported model writes after `prompt`, choosing the likeliest tokens."""
    tokenizer = tokenizer_files.load_tokenizer(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    number = inputs["input_ids"].shape[1]
    if number == 0:
        raise UsageError(f"--sample {prompt!r} has no tokens.")
    model = hugging_face.load(AutoModelForCausalLM, folder)
    room = hugging_face.context(model.config) - number
    if room < 1 or inputs["input_ids"].max() >= model.config.vocab_size:
        raise UsageError(
            f"--sample has {number} tokens, with ids up to {inputs['input_ids'].max()}; the model "
            f"reads fewer than {number + room}, with ids below {model.config.vocab_size}. Give "
            "another text."
        )
    tokens = model.generate(**inputs, max_new_tokens=min(32, room), do_sample=False)
    return tokenizer.decode(tokens[0])
