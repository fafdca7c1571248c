"""Writes a run's checkpoint as a folder that `transformers.from_pretrained` loads.

It goes layer by layer from disk to disk: the largest thing in memory is one layer's matrix, or the
embedding.
"""

import re
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig

from megatron_let import hugging_face
from megatron_let.checkpoint.folder import find_checkpoint
from megatron_let.checkpoint.reader import Checkpoint
from megatron_let.conversion.configs import family_of_run, hugging_face_config, model_shape
from megatron_let.conversion.family import Family
from megatron_let.conversion.mapping import NOT_WEIGHTS, ModelShape, Rule, check_names, rules_of
from megatron_let.conversion.output import check_free, complete_or_absent
from megatron_let.conversion.safetensors_folder import SafetensorsFolder
from megatron_let.conversion.tokenizer_files import (
    check_tokenizer,
    load_tokenizer,
    tokenizer_of_run,
    write_tokenizer,
)
from megatron_let.errors import UsageError
from megatron_let.teacher.load import DTYPES
from megatron_let.terminal import bars_on_a_terminal_only

SAMPLE_TOKENS = 32


@dataclass(frozen=True)
class ExportConfig:
    """One export.

    Raises:
        UsageError: a value that cannot be right.
    """

    load: Path
    """`--save` of the run."""
    output: Path
    """The folder to write; it must not exist, or be empty."""
    ckpt_step: int | None = None
    """The iteration; the latest if None."""
    tokenizer_model: str | None = None
    """Folder or hub id; the run's own if None."""
    dtype: str | None = None
    """A key of `DTYPES`; as saved if None."""
    max_shard_size: str = "5GB"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", self.max_shard_size):
            raise UsageError(
                f"--max-shard-size {self.max_shard_size} is not a size such as 5GB or 500MB."
            )
        check_free(self.output)


@dataclass(frozen=True)
class Plan:
    """What an export writes: the weights in the order of writing, and their shapes beforehand."""

    config: Any
    """transformers' configuration."""
    weights: list[tuple[Rule, int | None]]
    """Megatron's tensors, a layer at a time."""
    tensors: dict[str, torch.Tensor]
    """Hugging Face's names, and stand-ins (on `meta`) with shapes and types."""


def export(config: ExportConfig) -> Path:
    """Write the model and its tokenizer; returns the folder, which appears complete or not at all.

    Raises:
        UsageError: there is no such checkpoint, no family computes what the run's model does, its
            tensors are not those of its family, or the tokenizer is not the run's.
    """
    bars_on_a_terminal_only()
    checkpoint = Checkpoint(find_checkpoint(config.load, config.ckpt_step))
    args = checkpoint.args()
    family = family_of_run(args)
    source = config.tokenizer_model or tokenizer_of_run(args)
    tokenizer = load_tokenizer(source) if source is not None else None
    if source is not None and tokenizer is not None:
        check_tokenizer(args, tokenizer, source)
    shape = model_shape(args, _vocabulary_rows(args, tokenizer))
    hf_config = hugging_face_config(family, args, shape, tokenizer)
    plan = _plan(
        checkpoint, family, shape, hf_config, DTYPES[config.dtype] if config.dtype else None
    )
    with complete_or_absent(config.output) as folder:
        plan.config.save_pretrained(folder)
        GenerationConfig.from_model_config(plan.config).save_pretrained(folder)
        _write_weights(checkpoint, plan, shape, folder, config.max_shard_size)
        if source is not None and tokenizer is not None:
            write_tokenizer(source, tokenizer, folder)
    return config.output


def sample(folder: Path, prompt: str) -> str:
    """Return what an exported model writes after `prompt`, choosing the likeliest tokens.

    Raises:
        UsageError: the folder has no tokenizer, or the prompt no tokens.
    """
    bars_on_a_terminal_only()
    tokenizer = load_tokenizer(str(folder))
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].shape[1] == 0:
        raise UsageError(f"--sample {prompt!r} has no tokens.")
    model = hugging_face.load(AutoModelForCausalLM, folder, f"{folder} cannot be loaded.")
    tokens = model.generate(**inputs, max_new_tokens=SAMPLE_TOKENS, do_sample=False)
    return tokenizer.decode(tokens[0])


def _vocabulary_rows(args: Namespace, tokenizer: Any | None) -> int:
    """Rows that the exported table keeps: a model's that came with more rows than tokens, too."""
    given = vars(args).get("vocab_size") or 0
    return given if tokenizer is None else max(given, len(tokenizer))


# --- the plan ----------------------------------------------------------------------------------


def _plan(
    checkpoint: Checkpoint,
    family: Family,
    shape: ModelShape,
    hf_config: Any,
    dtype: torch.dtype | None,
) -> Plan:
    rules = rules_of(family.rules, tied=hf_config.tie_word_embeddings)
    expected = [rule.megatron for rule in rules]
    what = f"the checkpoint, by its arguments a {family.name},"
    check_names(expected, checkpoint.names, what, NOT_WEIGHTS)
    tensors: dict[str, torch.Tensor] = {}
    weights = list(_by_layer(rules, shape))
    for rule, layer in weights:
        tensors.update(rule.split(_stand_in(checkpoint, rule, shape, dtype), layer, shape))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config, trust_remote_code=False)
    _check_shapes(tensors, model)
    hf_config.architectures = [type(model).__name__]
    hf_config.dtype = next(iter(tensors.values())).dtype
    return Plan(hf_config, weights, tensors)


def _by_layer(rules: tuple[Rule, ...], shape: ModelShape) -> Iterator[tuple[Rule, int | None]]:
    """Yield what the whole model has once, then layer after layer."""
    yield from ((rule, None) for rule in rules if not rule.stacked)
    for layer in range(shape.num_layers):
        yield from ((rule, layer) for rule in rules if rule.stacked)


def _stand_in(
    checkpoint: Checkpoint, rule: Rule, shape: ModelShape, dtype: torch.dtype | None
) -> torch.Tensor:
    tensor = checkpoint.empty(rule.megatron)
    if rule.stacked:
        if tensor.shape[0] != shape.num_layers:
            raise UsageError(
                f"{rule.megatron} stacks {tensor.shape[0]} layers; the run had {shape.num_layers}."
            )
        tensor = tensor[0]
    return tensor.to(dtype or tensor.dtype)


def _check_shapes(tensors: dict[str, torch.Tensor], model: Any) -> None:
    expected = model.state_dict()
    for name, tensor in tensors.items():
        if name in expected and tensor.shape != expected[name].shape:
            raise UsageError(
                f"{name} has the shape {tuple(tensor.shape)}; the run's arguments make it "
                f"{tuple(expected[name].shape)}."
            )


# --- the weights -------------------------------------------------------------------------------


def _write_weights(
    checkpoint: Checkpoint, plan: Plan, shape: ModelShape, folder: Path, max_shard_size: str
) -> None:
    """Read one tensor while the one before is written."""
    with (
        SafetensorsFolder(folder, plan.tensors, max_shard_size) as output,
        ThreadPoolExecutor(1) as writer,
    ):

        def write(rule: Rule, layer: int | None, weight: torch.Tensor) -> None:
            for name, part in rule.split(weight, layer, shape):
                output.write(name, part)

        before: Future[None] | None = None
        for rule, layer in tqdm(plan.weights, desc="weights", disable=None):
            weight = checkpoint.read(rule.megatron, layer)
            if before is not None:
                before.result()
            before = writer.submit(write, rule, layer, weight)
        if before is not None:
            before.result()
