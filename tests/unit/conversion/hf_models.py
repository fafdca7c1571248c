"""Small Hugging Face models of every family, with what makes a conversion go wrong unseen."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Tokenizer

VOCAB, POSITIONS, LAYERS = 300, 64, 4
_LLAMA = {"hidden_size": 32, "intermediate_size": 48, "rms_norm_eps": 1e-6}
_GQA = {"num_key_value_heads": 2}
_THETA = 500000.0  # so that some wavelengths are beyond the context that Llama 3 scales
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": _THETA,
    "factor": 4.0,  # Megatron's default is 8
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
_DEFAULT = {"rope_type": "default", "rope_theta": 5000.0}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama",
        _LLAMA
        | _GQA
        | {"rope_parameters": _LLAMA3, "max_position_embeddings": 16384}
        | {"tie_word_embeddings": False},
    ),
    "llama-tied": (
        "llama",
        _LLAMA
        | {"num_key_value_heads": 4, "head_dim": 16, "rope_parameters": _LINEAR}
        | {"tie_word_embeddings": True},
    ),
    "qwen2": ("qwen2", _LLAMA | _GQA | {"rope_parameters": _DEFAULT, "tie_word_embeddings": True}),
    "qwen3": (
        "qwen3",
        _LLAMA | _GQA | {"head_dim": 16, "rope_parameters": _DEFAULT, "tie_word_embeddings": False},
    ),
    "mistral": (
        "mistral",
        _LLAMA
        | _GQA
        | {"sliding_window": None, "rope_parameters": _DEFAULT, "tie_word_embeddings": False},
    ),
    "smollm3": (
        "smollm3",
        _LLAMA | _GQA | {"rope_parameters": _DEFAULT, "pad_token_id": None},
    ),
    "gpt2": ("gpt2", {"n_embd": 32, "n_inner": 80, "activation_function": "gelu_new"}),
    "gpt2-untied": (
        "gpt2",
        {"n_embd": 32, "activation_function": "gelu", "tie_word_embeddings": False},
    ),
    "gpt_neox": (
        "gpt_neox",
        {
            "hidden_size": 32,
            "intermediate_size": 80,
            "hidden_act": "gelu",
            "use_parallel_residual": False,
            "rope_parameters": _DEFAULT | {"partial_rotary_factor": 0.25},
        },
    ),
}


def make_model(name: str, seed: int = 0) -> Any:
    """Return a model of `MODELS` with random weights, biases and norms."""
    model_type, fields = MODELS[name]
    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCAB,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=0,
        **{"max_position_embeddings": POSITIONS} | fields,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        # Far from 0 and 1, so that a bias, a norm or a layer in another's place shows.
        parameter.data.normal_(std=0.2, generator=generator)
        if "norm" in parameter_name or ".ln_" in parameter_name:
            parameter.data += 1
    return model


def save_model(name: str, folder: Path, *, tokenizer: bool = True) -> Path:
    """Save a model of `MODELS` as Hugging Face does; returns the folder."""
    make_model(name).save_pretrained(folder)
    if tokenizer and name == "qwen2":
        write_qwen_tokenizer(folder)
    elif tokenizer:
        write_tokenizer(folder)
    return folder


def write_qwen_tokenizer(folder: Path) -> Path:
    """Save a tokenizer of bytes, of the kind that transformers takes for Qwen2."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    tokens += [f"<|{i}|>" for i in range(VOCAB - len(tokens))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    Qwen2Tokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, size: int = VOCAB) -> Path:
    """Save a tokenizer of words w0, w1, ..."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", bos_token="w0")
    tokenizer.save_pretrained(folder)
    return folder
