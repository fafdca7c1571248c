"""A model's shape from its Hugging Face `config.json`, and the teachers known by name."""

import json
from pathlib import Path
from typing import Any

from megatron_let.errors import UsageError
from megatron_let.planning.shapes import LLAMA_STYLE, ModelShape

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
    """Return the shape of a known teacher, or of the model in a Hugging Face folder.

    A teacher of `TEACHERS` may have an organisation before its name (`HuggingFaceTB/SmolLM-135M`).
    Raises UsageError for any other name, and for parameters that are not known on paper.
    """
    if Path(name).expanduser().is_dir():
        return folder_shape(name)
    short = name.rsplit("/", 1)[-1].lower()
    if short not in TEACHERS:
        raise UsageError(
            f"--teacher {name} is neither a folder nor a known name. Choose "
            f"{', '.join(TEACHERS)}, or download the model and give its folder."
        )
    return from_hf_config(TEACHERS[short], name=short)


def folder_shape(name: str) -> ModelShape:
    """Return the shape of the model in a Hugging Face folder; raises as `from_hf_config`."""
    folder = Path(name).expanduser()
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
