"""A model's shape from its Hugging Face `config.json`, and the teachers known by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_let.errors import UsageError
from megatron_let.planning.shapes import MEGATRON_DEFAULT_STYLE, ModelShape

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

    Args:
        name: a name in `TEACHERS`, with or without an organisation before it
            (`HuggingFaceTB/SmolLM-135M`), or a folder with a `config.json`.

    Raises:
        UsageError: neither, or a model whose parameters are not known on paper.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return from_hf_config(_read_config(folder), name=folder.resolve().name)
    short = name.rsplit("/", 1)[-1].lower()
    if short not in TEACHERS:
        raise UsageError(
            f"--teacher {name} is neither a folder nor a known name. Choose "
            f"{', '.join(TEACHERS)}, or download the model and give its folder."
        )
    return from_hf_config(TEACHERS[short], name=short)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"--teacher {folder}: config.json cannot be read ({error}). Give the folder of a "
            "Hugging Face model."
        ) from error
    if not isinstance(config, dict):
        raise UsageError(f"--teacher {folder}: config.json is not an object of settings.")
    return config


def from_hf_config(config: dict[str, Any], *, name: str) -> ModelShape:
    """Return the shape that a `config.json` describes.

    Raises:
        UsageError: an architecture or an option whose parameters are not known here, or a size
            is missing.
    """
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise UsageError(
            f"The teacher {name} is a {model_type}; known on paper are {', '.join(ARCHITECTURES)}."
        )
    try:
        return ModelShape(name=name, **ARCHITECTURES[model_type](config))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UsageError(
            f"The teacher {name} lacks a size in its config.json, or has an impossible one "
            f"({error!r}). Give the folder of a complete model."
        ) from error


def _llama(config: dict[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    attention_bias = config.get("attention_bias", False)
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "vocab_size": config["vocab_size"],
        "gated": True,
        "tied": config.get("tie_word_embeddings", False),
        "rms_norm": True,
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
        "mlp_bias": config.get("mlp_bias", False),
        "context": config["max_position_embeddings"],
    }


def _qwen2(config: dict[str, Any]) -> dict[str, Any]:
    return _llama(config) | {"qkv_bias": True, "output_bias": False}


def _qwen3(config: dict[str, Any]) -> dict[str, Any]:
    return _llama(config) | {"kv_channels": config.get("head_dim", 128), "qk_norm": True}


def _gpt_style(config: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    hidden_size, heads = config["hidden_size"], config["num_attention_heads"]
    return MEGATRON_DEFAULT_STYLE | {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": hidden_size // heads,
        "vocab_size": config["vocab_size"],
        "tied": config.get("tie_word_embeddings", tied),
        "context": config["max_position_embeddings"],
    }


def _opt(config: dict[str, Any]) -> dict[str, Any]:
    bias = config.get("enable_bias", True)
    # The exceptions of the family: opt-350m normalizes after each block and projects its states.
    unusual = {"word_embed_proj_dim": config["hidden_size"], "do_layer_norm_before": True}
    for key, usual in unusual.items():
        if config.get(key, usual) != usual:
            raise UsageError(
                f"An OPT with {key} {config[key]} is not known on paper (opt-350m has that). "
                "Choose another size, such as opt-125m."
            )
    return _gpt_style(config, tied=True) | {
        "ffn_hidden_size": config["ffn_dim"],
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": bias,
        "position_rows": config["max_position_embeddings"] + 2,  # OPT's offset
    }


def _gpt_neox(config: dict[str, Any]) -> dict[str, Any]:
    attention_bias = config.get("attention_bias", True)
    return _gpt_style(config, tied=False) | {
        "ffn_hidden_size": config["intermediate_size"],
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
    }


def _gpt2(config: dict[str, Any]) -> dict[str, Any]:
    usual_names = {
        "hidden_size": config["n_embd"],
        "num_attention_heads": config["n_head"],
        "num_hidden_layers": config["n_layer"],
        "max_position_embeddings": config["n_positions"],
    }
    return _gpt_style(config | usual_names, tied=True) | {
        "ffn_hidden_size": config.get("n_inner") or 4 * config["n_embd"],
        "position_rows": config["n_positions"],
    }


ARCHITECTURES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "opt": _opt,
    "gpt_neox": _gpt_neox,
    "gpt2": _gpt2,
}
"""For each `model_type` the function that reads its sizes."""
