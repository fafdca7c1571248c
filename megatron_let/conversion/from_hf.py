"""Writes a Hugging Face model as a checkpoint that Megatron loads in any layout.

It goes layer by layer from disk to disk. The checkpoint is what Megatron calls a release: weights
without optimizer, from which a run starts at step 0.
"""

import functools
import sys
import warnings
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import snapshot_download
from torch.distributed.checkpoint import (
    CheckpointException,
    ChunkStorageMetadata,
    DefaultSavePlanner,
    FileSystemWriter,
)
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from tqdm import tqdm
from transformers import AutoConfig

from megatron_let import hugging_face
from megatron_let.checkpoint.folder import TRACKER
from megatron_let.checkpoint.reader import COMMON_STATE
from megatron_let.conversion import checks, configs
from megatron_let.conversion.family import EMBEDDING, Family, ModelShape, Rule
from megatron_let.conversion.output import PiecewiseFile, check_free, complete_or_absent
from megatron_let.conversion.safetensors_files import SafetensorsReader
from megatron_let.conversion.tokenizer_files import load_tokenizer, write_tokenizer
from megatron_let.data.tokenizer import tokenizer_fingerprint
from megatron_let.errors import UsageError
from megatron_let.hugging_face import TOKENIZER_FILES, bars_on_a_terminal_only, has_tokenizer
from megatron_let.methods.table import BASELINE
from megatron_let.teacher.load import DTYPES

FLAGS_FILE = "megatron_flags.txt"
METADATA = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
LAYERS_WITH_EXTRA_STATE = (
    "self_attention.linear_qkv self_attention.core_attention self_attention.q_layernorm "
    "self_attention.k_layernorm self_attention.linear_proj mlp.linear_fc1 mlp.linear_fc2"
).split()
"""Modules whose `_extra_state` Megatron asks for when it loads: Transformer Engine's, for FP8."""


def import_model(
    hf_model: str, output: Path, *, revision: str | None = None, dtype: str | None = None
) -> Path:
    """Write the checkpoint; returns the folder, which appears complete or not at all.

    Beside the weights it holds the tokenizer, and `megatron_flags.txt` with the flags of a run that
    computes the same. `hf_model` is a folder or hub id, with `revision` a branch, tag or commit on
    the hub; `output`, a run's `--load`, must not exist, or be empty. Without `dtype`, a key of
    `DTYPES`, the weights stay as saved; Megatron loads into the run's own type anyway.
    """
    check_free(output)
    if any(character.isspace() for character in str(output.absolute())):
        raise UsageError(f"--output {output} has a blank in it, which {FLAGS_FILE} cannot hold.")
    source = open_model("--hf-model", hf_model, revision)
    with complete_or_absent(output) as folder:
        values = source.values | _tokenizer(source, folder, output)
        (folder / "release").mkdir()
        _write_release(folder / "release", source, dtype, _objects(values))
        flags = [*configs.megatron_flags(values), "--load", str(output.absolute())]
        if values["tokenizer_model"] is not None:
            flags += ["--tokenizer-type", values["tokenizer_type"]]
            flags += ["--tokenizer-model", values["tokenizer_model"]]
        (folder / FLAGS_FILE).write_text(" ".join(flags) + "\n")
        (folder / TRACKER).write_text("release")
    return output


def local_folder(hf_model: str, revision: str | None, flag: str = "--hf-model") -> Path:
    """Return the model's folder, fetched from the hub if it is none."""
    if Path(hf_model).is_dir():
        hugging_face.check_revision("--revision", revision, hf_model)
        return Path(hf_model)
    bars_on_a_terminal_only()
    files = ["*.json", "*.safetensors", *TOKENIZER_FILES]
    again = "consolidated*"  # all of Mistral's weights, by other names
    fetch = functools.partial(snapshot_download, allow_patterns=files, ignore_patterns=again)
    try:
        return Path(fetch(hf_model, revision=revision))
    except (OSError, ValueError) as error:
        failure = f"{flag} {hf_model} is no folder, and the hub does not give it."
        raise hugging_face.unreadable(failure, error) from error


@dataclass(frozen=True)
class Source:
    """A Hugging Face model, opened: what a family computes, with that family's tensors."""

    folder: Path
    config: Any
    family: Family
    values: dict[str, Any]
    """Megatron's arguments."""
    rules: tuple[Rule, ...]
    shape: ModelShape
    reader: SafetensorsReader


def open_model(flag: str, hf_model: str, revision: str | None = None) -> Source:
    """Open a folder or hub id, which a flag names.

    Its tensors must be those of its family, in the shapes that its configuration makes.
    """
    folder = local_folder(hf_model, revision, flag)
    failure = f"{flag} {folder} has no configuration to load."
    config = hugging_face.load(AutoConfig, folder, failure)
    family = configs.family_of_config(config)
    values = configs.megatron_values(family, config) | {"vocab_size": config.vocab_size}
    shape = configs.model_shape(Namespace(**values), config.vocab_size)
    rules = checks.rules_of(family.rules, tied=config.tie_word_embeddings)
    model = configs.empty_model(config)
    reader = SafetensorsReader(folder, model.base_model_prefix)
    # The output layer of a tied model, which some folders hold as well.
    left_out = {rule.hugging_face[0] for rule in family.rules if rule not in rules}
    twice = left_out & reader.names
    names = [name for rule, layer in checks.pieces(rules, shape) for name in rule.names(layer)]
    what = f"{folder}, by its configuration a {family.name},"
    checks.check_names(names, reader.names - twice, what, checks.NOT_HUGGING_FACE_WEIGHTS)
    found = {name: reader.empty(name) for name in names}
    checks.check_shapes(found, model.state_dict(), "config.json makes")
    embedding = next(rule.hugging_face[0] for rule in rules if rule.megatron == EMBEDDING)
    for head in twice:
        # If it is another matrix, then transformers does not tie them either.
        if not torch.equal(reader.read(head), reader.read(embedding)):
            raise UsageError(
                f"{head} in {folder} is not {embedding}, though config.json says that they are "
                'tied. Set "tie_word_embeddings": false there.'
            )
    return Source(folder, config, family, values, rules, shape, reader)


def _tokenizer(source: Source, folder: Path, output: Path) -> dict[str, Any]:
    """Copy the tokenizer, if the model has one; returns the arguments that name it."""
    if not has_tokenizer(source.folder):
        return {"tokenizer_type": "NullTokenizer", "tokenizer_model": None}
    tokenizer = load_tokenizer(source.folder)
    largest, rows = max(tokenizer.get_vocab().values(), default=-1), source.shape.vocab_size
    if largest >= rows:
        tqdm.write(
            f"> {source.folder}: the tokenizer has ids up to {largest} and the model {rows} rows, "
            f"0 to {rows - 1}. In a run the other ids begin as rows of zeros.",
            file=sys.stderr,
        )
    write_tokenizer(source.folder, tokenizer, folder / "tokenizer")
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
    final = {"decoder.final_layernorm._extra_state/shard_0_1": [None]}
    return {COMMON_STATE: [common]} | final | extra_states


def _write_release(
    folder: Path, source: Source, dtype: str | None, objects: dict[str, Any]
) -> None:
    """Write the weights, a layer of each as a piece of its own as Megatron does, and `objects`."""
    reader, shape = source.reader, source.shape
    rules = {rule.megatron: rule for rule in source.rules}
    dtypes: dict[str, torch.dtype] = {}
    pieces: list[WriteItem] = []
    for name, rule in rules.items():
        layers = range(shape.num_layers) if rule.stacked else (None,)
        parts = [rule.join(reader.empty, layer, shape) for layer in layers]
        tensor = torch.stack(parts) if rule.stacked else parts[0]  # in the widest type of them
        tensor = tensor.to(DTYPES[dtype] if dtype else tensor.dtype)
        dtypes[name] = tensor.dtype
        pieces += [_piece(name, tensor, layer) for layer in layers]
    others = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in objects]
    bar = tqdm(total=len(pieces), desc="weights", disable=None)

    class Planner(DefaultSavePlanner):
        """Tells the writer what there is, and gets each item when it is its turn."""

        def create_local_plan(self) -> SavePlan:
            return SavePlan([*others, *pieces])

        def lookup_object(self, index: MetadataIndex) -> Any:
            name = index.fqn
            if name in objects:
                return objects[name]
            bar.update()
            rule = rules[name]
            piece = rule.join(reader.read, index.index if rule.stacked else None, shape)
            piece = checks.check_finite(name, piece.to(dtypes[name]))  # a cast may be too much
            return (piece.unsqueeze(0) if rule.stacked else piece).contiguous()

    with bar, warnings.catch_warnings():
        # It says that one process writes, which is what we want.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        writer = FileSystemWriter(folder)
        writer.fs.create_stream = PiecewiseFile  # type: ignore[method-assign, assignment]
        planner = Planner(flatten_state_dict=False)
        try:
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as error:  # hides what `read` or the disk has said
            raise next(iter(error.failures.values()))[0] from None
    (folder / "metadata.json").write_text(METADATA)


def _piece(name: str, tensor: torch.Tensor, layer: int | None) -> WriteItem:
    offsets, sizes = [0] * tensor.dim(), list(tensor.shape)
    if layer is not None:
        offsets[0], sizes[0] = layer, 1
    chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    return WriteItem(
        MetadataIndex(name, chunk.offsets, layer or 0),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk, TensorProperties(tensor.dtype), tensor.shape),
    )
