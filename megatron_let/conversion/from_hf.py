"""Writes a Hugging Face model as a checkpoint that Megatron loads in any layout.

It goes layer by layer from disk to disk. The checkpoint is what Megatron calls a release: weights
without optimizer, from which a run starts at step 0.
"""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_let import hugging_face
from megatron_let.checkpoint.folder import TRACKER
from megatron_let.checkpoint.reader import COMMON_STATE
from megatron_let.conversion.configs import (
    family_of_config,
    megatron_flags,
    megatron_values,
    model_shape,
)
from megatron_let.conversion.family import Family
from megatron_let.conversion.mapping import (
    NOT_HUGGING_FACE_WEIGHTS,
    OUTPUT_LAYER,
    ModelShape,
    check_names,
    rules_of,
)
from megatron_let.conversion.output import check_free, complete_or_absent
from megatron_let.conversion.safetensors_reader import SafetensorsReader
from megatron_let.conversion.tokenizer_files import load_tokenizer, write_tokenizer
from megatron_let.conversion.write_checkpoint import write_checkpoint
from megatron_let.data.fingerprint import tokenizer_fingerprint
from megatron_let.errors import UsageError
from megatron_let.hugging_face import TOKENIZER_FILES, has_tokenizer
from megatron_let.methods.table import BASELINE
from megatron_let.teacher.load import DTYPES
from megatron_let.terminal import bars_on_a_terminal_only

FLAGS_FILE = "megatron_flags.txt"
FILES_OF_A_MODEL = ("*.json", "*.safetensors", *TOKENIZER_FILES)

LAYERS_WITH_EXTRA_STATE = (
    "self_attention.linear_qkv self_attention.core_attention self_attention.q_layernorm "
    "self_attention.k_layernorm self_attention.linear_proj mlp.linear_fc1 mlp.linear_fc2"
).split()
"""Modules whose `_extra_state` Megatron asks for when it loads: Transformer Engine's, for FP8."""


@dataclass(frozen=True)
class ImportConfig:
    """One import.

    Raises:
        UsageError: a value that cannot be right.
    """

    hf_model: str
    """Folder or hub id."""
    output: Path
    """The folder to write, a run's `--load`; it must not exist, or be empty."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: str | None = None
    """A key of `DTYPES`; as saved if None. Megatron loads into the run's own type anyway."""

    def __post_init__(self) -> None:
        check_free(self.output)
        if any(character.isspace() for character in str(self.output.absolute())):
            raise UsageError(
                f"--output {self.output} has a blank in its path, which {FLAGS_FILE} cannot hold."
            )


def import_model(config: ImportConfig) -> Path:
    """Write the checkpoint; returns the folder, which appears complete or not at all.

    Beside the weights it holds the tokenizer, and `megatron_flags.txt` with the flags of a run that
    computes the same.

    Raises:
        UsageError: there is no such model, Megatron does not compute what it does, or its tensors
            are not those of its family.
    """
    bars_on_a_terminal_only()
    source = local_folder(config)
    hf_config = hugging_face.load(
        AutoConfig, source, f"--hf-model {source} has no configuration to load."
    )
    family = family_of_config(hf_config)
    values = megatron_values(family, hf_config) | {"vocab_size": hf_config.vocab_size}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config, trust_remote_code=False)
    weights = _Weights(
        source, family, model, model_shape(Namespace(**values), hf_config.vocab_size)
    )
    with complete_or_absent(config.output) as folder:
        values |= _tokenizer(source, folder, config.output)
        release = folder / "release"
        release.mkdir()
        tensors = weights.stand_ins(DTYPES[config.dtype] if config.dtype else None)
        pieces = sum(len(tensor) if stacked else 1 for tensor, stacked in tensors.values())
        with tqdm(total=pieces, desc="weights", disable=None) as bar:

            def read(name: str, layer: int | None) -> torch.Tensor:
                bar.update()
                return weights.read(name, layer)

            write_checkpoint(release, tensors, read, _objects(values))
        (folder / FLAGS_FILE).write_text(" ".join(run_flags(values, config.output)) + "\n")
        (folder / TRACKER).write_text("release")
    return config.output


def run_flags(values: dict[str, Any], load: Path) -> list[str]:
    """Return the flags with which a run starts from the checkpoint."""
    flags = [*megatron_flags(values), "--load", str(load.absolute())]
    if values["tokenizer_model"] is not None:
        flags += ["--tokenizer-type", values["tokenizer_type"]]
        flags += ["--tokenizer-model", values["tokenizer_model"]]
    return flags


# --- what is read ------------------------------------------------------------------------------


def local_folder(config: ImportConfig) -> Path:
    """Return the model's folder, fetched from the hub if it is none.

    Raises:
        UsageError: neither is there.
    """
    folder = Path(config.hf_model)
    if folder.is_dir():
        return folder
    try:
        return Path(
            snapshot_download(
                config.hf_model, revision=config.revision, allow_patterns=list(FILES_OF_A_MODEL)
            )
        )
    except (OSError, ValueError) as error:
        reason = hugging_face.first_line(error)
        raise UsageError(
            f"--hf-model {config.hf_model} is no folder, and the hub does not give it: {reason}"
        ) from error


class _Weights:
    """A model's tensors as Megatron has them, made when they are asked for."""

    def __init__(self, folder: Path, family: Family, model: Any, shape: ModelShape) -> None:
        tied = model.config.tie_word_embeddings
        self._reader = SafetensorsReader(folder, model.base_model_prefix)
        self._rules = {rule.megatron: rule for rule in rules_of(family.rules, tied=tied)}
        self._shape = shape
        expected = [
            name
            for rule in self._rules.values()
            for layer in rule.layers(shape)
            for name in rule.names(layer)
        ]
        found = self._reader.names
        if tied:
            found = found - self._copy_of_embedding(family)
        what = f"{folder}, by its configuration a {family.name},"
        check_names(expected, found, what, NOT_HUGGING_FACE_WEIGHTS)
        self._check_shapes(expected, model.state_dict())

    def _copy_of_embedding(self, family: Family) -> set[str]:
        """The output layer of a tied model, which some folders hold as well.

        Raises:
            UsageError: it is another matrix; then transformers does not tie them either.
        """
        heads = {
            name
            for rule in family.rules
            if rule.megatron == OUTPUT_LAYER
            for name in rule.names(None)
        }
        embedding = next(rule.names(None)[0] for rule in family.rules)
        for name in heads & self._reader.names:
            if not torch.equal(self._reader.read(name), self._reader.read(embedding)):
                raise UsageError(
                    f"{name} in {self._reader.folder} is not {embedding}, though config.json says "
                    'that they are tied. Set "tie_word_embeddings": false there.'
                )
        return heads

    def _check_shapes(self, names: list[str], expected: dict[str, torch.Tensor]) -> None:
        for name in names:
            shape = self._reader.empty(name).shape
            if name in expected and shape != expected[name].shape:
                raise UsageError(
                    f"{name} has the shape {tuple(shape)}; config.json makes it "
                    f"{tuple(expected[name].shape)}."
                )

    def stand_ins(self, dtype: torch.dtype | None) -> dict[str, tuple[torch.Tensor, bool]]:
        """Return every tensor's shape and type (on `meta`), and whether it is stacked."""
        tensors = {}
        for name, rule in self._rules.items():
            layer = 0 if rule.stacked else None
            parts = tuple(self._reader.empty(part) for part in rule.names(layer))
            tensor = rule.form.join(parts, self._shape)
            size = (self._shape.num_layers, *tensor.shape) if rule.stacked else tensor.shape
            stand_in = torch.empty(size, dtype=dtype or tensor.dtype, device="meta")
            tensors[name] = stand_in, rule.stacked
        return tensors

    def read(self, name: str, layer: int | None) -> torch.Tensor:
        """Return one of Megatron's tensors, or a layer of it."""
        rule = self._rules[name]
        parts = tuple(self._reader.read(part) for part in rule.names(layer))
        return rule.form.join(parts, self._shape)


# --- what is written beside the weights --------------------------------------------------------


def _tokenizer(source: Path, folder: Path, output: Path) -> dict[str, Any]:
    """Copy the tokenizer, if the model has one; returns the arguments that name it."""
    if not has_tokenizer(source):
        return {"tokenizer_type": "NullTokenizer", "tokenizer_model": None}
    tokenizer = load_tokenizer(str(source))
    (folder / "tokenizer").mkdir()
    write_tokenizer(str(source), tokenizer, folder / "tokenizer")
    return {
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": str((output / "tokenizer").absolute()),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer.get_vocab()),
    }


def _objects(values: dict[str, Any]) -> dict[str, Any]:
    rows = {"padded_vocab_size": values["vocab_size"], "make_vocab_size_divisible_by": 1}
    layout = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
    ours = {"method": BASELINE, "pad_vocab_size": False, "ckpt_format": "torch_dist"}
    args = Namespace(**values, **rows, **layout, **ours)
    common = {"args": args, "checkpoint_version": 3.0, "iteration": 0}
    layers = values["num_layers"]
    extra_states = {
        f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}": [None]
        for module in LAYERS_WITH_EXTRA_STATE
        for layer in range(layers)
    }
    return {
        COMMON_STATE: [common],
        "decoder.final_layernorm._extra_state/shard_0_1": [None],
        **extra_states,
    }
