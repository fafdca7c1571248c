"""What a decoder-only model is made of, as far as arithmetic needs it: students and teachers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import ceil
from pathlib import Path
from typing import Any

from megatron_let.errors import UsageError
from megatron_let.teacher.work import window_ends

FORWARD_AND_BACKWARD = 3
"""FLOPs in forward passes: the gradients of activations and of weights cost one more each."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A dense decoder-only model, by default in Megatron's style; parameter counts are exact.

    FLOPs per token are counted as Megatron's `num_floating_point_operations` does: two per weight
    of a matrix; causal attention's two products over half of the sequence; the LM head with its
    padded vocabulary; no embedding lookup, norm or activation function.
    """

    name: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Heads of the keys and of the values; as many as attention heads without GQA."""
    kv_channels: int  # width of one head
    vocab_size: int  # rows of the embedding, padding included
    gated: bool = False  # SwiGLU: a third matrix in the MLP
    tied: bool = True  # the LM head is the embedding
    rms_norm: bool = False  # RMSNorm has a weight only, LayerNorm a bias too
    qkv_bias: bool = True
    output_bias: bool = True  # bias of the attention's output projection
    mlp_bias: bool = True
    qk_norm: bool = False
    position_rows: int = 0  # rows of a learned position embedding; 0 for rotary positions
    context: int | None = None
    """Longest sequence in tokens that it was trained for; None for a model yet to be trained."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and field.name != "position_rows" and value < 1:
                raise UsageError(f"{self.name}: {field.name} {value} must be at least 1.")
        if self.num_attention_heads % self.num_query_groups:
            raise UsageError(
                f"{self.name}: {self.num_attention_heads} attention heads cannot share "
                f"{self.num_query_groups} query groups evenly. Choose a divisor of "
                f"{self.num_attention_heads}."
            )

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.kv_channels

    @property
    def key_value_size(self) -> int:
        """Width of all keys and values together."""
        return 2 * self.num_query_groups * self.kv_channels

    @property
    def mlp_matrices(self) -> int:
        """Matrices of `hidden_size x ffn_hidden_size` in one MLP."""
        return 2 + self.gated

    @property
    def norm_parameters(self) -> int:
        """Of one norm of the hidden width."""
        return self.hidden_size * (2 - self.rms_norm)

    @property
    def layer_matrix_parameters(self) -> int:
        """Weights of one layer that take part in matrix products."""
        attention = self.hidden_size * (2 * self.query_size + self.key_value_size)
        return attention + self.mlp_matrices * self.hidden_size * self.ffn_hidden_size

    @property
    def layer_split_parameters(self) -> int:
        """Parameters of one layer that tensor parallelism divides: matrices, outer biases."""
        qkv = (self.query_size + self.key_value_size) * self.qkv_bias
        mlp = (self.mlp_matrices - 1) * self.ffn_hidden_size * self.mlp_bias
        return self.layer_matrix_parameters + qkv + mlp

    @property
    def layer_replicated_parameters(self) -> int:
        """Parameters of one layer that every tensor-parallel rank holds: norms, inner biases."""
        norms = 2 * (self.norm_parameters + self.qk_norm * self.kv_channels * (2 - self.rms_norm))
        return norms + self.hidden_size * (self.output_bias + self.mlp_bias)

    @property
    def layer_parameters(self) -> int:
        """All parameters of one layer."""
        return self.layer_split_parameters + self.layer_replicated_parameters

    @property
    def embedding_parameters(self) -> int:
        """Of the token embedding; the LM head has as many."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters_without_head(self) -> int:
        """Of what computes the states of the last layer."""
        positions = self.position_rows * self.hidden_size
        layers = self.num_layers * self.layer_parameters
        return self.embedding_parameters + positions + layers + self.norm_parameters

    @property
    def parameters(self) -> int:
        """Of the whole model, a tied head counted once."""
        return self.parameters_without_head + self.embedding_parameters * (not self.tied)

    def layer_flops_per_token(self, seq_length: int) -> float:
        """FLOPs of one layer's forward pass."""
        scores_and_values = 2 * 2 * self.query_size * seq_length / 2  # half: the causal mask
        return 2 * self.layer_matrix_parameters + scores_and_values

    @property
    def head_flops_per_token(self) -> float:
        """FLOPs of the logits, forward."""
        return 2 * self.embedding_parameters

    def training_flops_per_token(self, seq_length: int) -> float:
        """FLOPs of a forward and backward pass through the whole model."""
        layers = self.num_layers * self.layer_flops_per_token(seq_length)
        return FORWARD_AND_BACKWARD * (layers + self.head_flops_per_token)

    def states_flops_per_token(self, seq_length: int, row: int) -> float:
        """FLOPs of a teacher's last states, without its LM head, per token of the student.

        A sequence takes `row` of the teacher's tokens. One longer than its context is read in
        windows, some tokens twice.
        """
        context = row if self.context is None else self.context
        length = min(row, context)
        tokens_read = length * len(window_ends(row, context)) / seq_length
        return tokens_read * self.num_layers * self.layer_flops_per_token(length)


SIZES = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels"
).split()
"""Fields of `ModelShape` that are flags of Megatron's, too."""
# Late-to-Early Training (arXiv 2602.05393) names its students by size only; these shapes give it.
# 70b is Llama 3's.
STUDENTS = {
    "1.4b": (24, 2048, 5504, 16),
    "3b": (32, 2560, 6912, 20),
    "7b": (32, 4096, 11008, 32),
    "70b": (80, 8192, 28672, 64, 8),
}
"""The first ones of `SIZES`; the others follow from them."""
NO_BIAS = dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), False)
LLAMA_STYLE = {"gated": True, "tied": False, "rms_norm": True} | NO_BIAS


def student_shape(
    preset: str | None, *, vocab_size: int, changes: Mapping[str, Any] | None = None
) -> ModelShape:
    """Return a student: a preset in Llama's style, or without one Megatron's default style.

    The `vocab_size` rows of the embedding are padded ones. Of the fields of `ModelShape` that
    `changes` replaces, None is unset. An unknown preset or an incomplete shape is a UsageError.
    """
    given = {key: value for key, value in (changes or {}).items() if value is not None}
    values: dict[str, Any] = {"name": "custom"}
    if preset is not None:
        name = preset.lower()
        if name not in STUDENTS:
            raise UsageError(
                f"--student {preset} is unknown. Choose {', '.join(STUDENTS)}, or leave it out and "
                "give --num-layers --hidden-size --num-attention-heads."
            )
        sizes = dict(zip(SIZES, STUDENTS[name], strict=False))
        values = {"name": name + " changed" * bool(given), **LLAMA_STYLE, **sizes}
    values |= given
    missing = {"num_layers", "hidden_size", "num_attention_heads"} - values.keys()
    if missing:
        flags = " ".join("--" + name.replace("_", "-") for name in sorted(missing))
        raise UsageError(
            f"The student has no {flags}. Add it, or choose --student {', '.join(STUDENTS)}."
        )
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if "kv_channels" not in values and (heads < 1 or hidden % heads):
        raise UsageError(
            f"--hidden-size {hidden} does not divide into --num-attention-heads {heads}. Change "
            "one of them, or give the width of a head with --kv-channels."
        )
    gated_ffn = int(4 * hidden * 2 / 3 / 64) * 64
    derived = {  # as Megatron does
        "kv_channels": hidden // heads if heads else 0,
        "num_query_groups": heads,
        "ffn_hidden_size": gated_ffn if values.get("gated") else 4 * hidden,
    }
    return ModelShape(vocab_size=vocab_size, **derived | values)


def padded_vocab_size(vocab_size: int, *, tp: int, divisible_by: int = 128) -> int:
    """Rows of Megatron's embedding: every tensor-parallel rank has a multiple of `divisible_by`."""
    if min(vocab_size, divisible_by, tp) < 1:
        raise UsageError(
            f"--vocab-size {vocab_size}, --make-vocab-size-divisible-by {divisible_by} and --tp "
            f"{tp} must be at least 1."
        )
    multiple = divisible_by * tp
    return ceil(vocab_size / multiple) * multiple


# --- from a Hugging Face `config.json` ----------------------------------------------------------

# The released config.json of each, as far as it matters here.
TEACHERS: dict[str, dict[str, Any]] = {
    "smollm-135m": {
        "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536,
        "vocab_size": 49152, "max_position_embeddings": 2048, "tie_word_embeddings": True,
    },
    "opt-125m": {
        "model_type": "opt", "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "ffn_dim": 3072, "vocab_size": 50272,
        "max_position_embeddings": 2048,
    },
    "pythia-160m": {
        "model_type": "gpt_neox", "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 50304,
        "max_position_embeddings": 2048, "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192,
        "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": True,
    },
    "gpt2": {
        "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
        "vocab_size": 50257,
    },
}  # fmt: skip


def teacher_shape(name: str) -> ModelShape:
    """Return the shape of the model in a Hugging Face folder, or of a teacher of `TEACHERS`.

    An organisation may stand before its name. Raises UsageError for any other, and what is unknown.
    """
    folder, short = Path(name).expanduser(), name.rsplit("/", 1)[-1].lower()
    if not folder.is_dir():
        if short in TEACHERS:
            return from_hf_config(TEACHERS[short], name=short)
        raise UsageError(
            f"--teacher {name} is neither a folder nor a known name. Choose "
            f"{', '.join(TEACHERS)}, or download the model and give its folder."
        )
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{folder}: config.json cannot be read ({error}). Give a Hugging Face model's folder."
        ) from error
    if not isinstance(config, dict):
        raise UsageError(f"{folder}: config.json is not an object of settings.")
    return from_hf_config(config, name=folder.resolve().name)


def from_hf_config(config: dict[str, Any], *, name: str) -> ModelShape:
    """Return the shape that a `config.json` describes.

    Raises UsageError for an architecture or an option that is not known here, or a missing size.
    """
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise UsageError(
            f"The model {name} is a {model_type}; known on paper are {', '.join(ARCHITECTURES)}."
        )
    try:
        return ModelShape(name=name, **_fields(config, model_type))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UsageError(
            f"The model {name} lacks a size in its config.json, or has an impossible one "
            f"({error!r}). Give the folder of a complete model."
        ) from error


ARCHITECTURES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "llama": (LLAMA_STYLE, ("attention_bias", "mlp_bias")),
    "qwen2": (LLAMA_STYLE | {"qkv_bias": True}, ()),
    "qwen3": (LLAMA_STYLE | {"qk_norm": True, "kv_channels": 128}, ("attention_bias",)),
    "mistral": (LLAMA_STYLE, ()),
    "smollm3": (LLAMA_STYLE | {"tied": True}, ("attention_bias", "mlp_bias")),
    "opt": ({}, ("enable_bias",)),
    "gpt_neox": ({"tied": False}, ("attention_bias",)),
    "gpt2": ({}, ()),
}
"""For each `model_type` what it is made of, as fields of `ModelShape`, and the switches it has."""
SWITCHES = {
    "attention_bias": ("qkv_bias", "output_bias"),
    "mlp_bias": ("mlp_bias",),
    "enable_bias": ("qkv_bias", "output_bias", "mlp_bias"),
    "tie_word_embeddings": ("tied",),
}
"""Options of a config -> the fields that they set."""
USUAL_NAMES = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
    "ffn_dim": "intermediate_size",
}
POSITION_OFFSETS = {"opt": 2, "gpt2": 0}  # rows of a learned position embedding beyond the context


def _fields(config: dict[str, Any], model_type: str) -> dict[str, Any]:
    config = config | {usual: config[own] for own, usual in USUAL_NAMES.items() if own in config}
    heads, hidden_size = config["num_attention_heads"], config["hidden_size"]
    context = config["max_position_embeddings"]
    if model_type == "gpt2":
        config["intermediate_size"] = config.get("intermediate_size") or 4 * hidden_size
    # opt-350m normalizes after each block and projects its states.
    usual = {"word_embed_proj_dim": hidden_size, "do_layer_norm_before": True}
    for key, value in usual.items() if model_type == "opt" else ():
        if config.get(key, value) != value:
            raise UsageError(
                f"An OPT with {key} {config[key]} is not known on paper (opt-350m has that). "
                "Choose another size, such as opt-125m."
            )
    style, switches = ARCHITECTURES[model_type]
    sizes = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": hidden_size,
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "vocab_size": config["vocab_size"],
        "context": context,
    }
    if model_type in POSITION_OFFSETS:
        sizes["position_rows"] = context + POSITION_OFFSETS[model_type]
    width = config.get("head_dim") or style.get("kv_channels") or hidden_size // heads
    given = {
        field: config[switch]
        for switch in (*switches, "tie_word_embeddings")
        for field in SWITCHES[switch]
        if switch in config
    }
    return style | given | sizes | {"kv_channels": width}
