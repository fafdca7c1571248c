"""Llama, Qwen2, Qwen3: gated MLP, RMSNorm, rotary positions."""

from argparse import Namespace
from dataclasses import replace
from typing import Any

from megatron_let.conversion import rope
from megatron_let.conversion.family import (
    EMBEDDING,
    FC1,
    FC2,
    FINAL_NORM,
    GATED_MLP,
    OUTPUT_LAYER,
    PROJECTION,
    QKV,
    QKV_NAME,
    VOCABULARY,
    Family,
    ModelShape,
    Rule,
    Values,
)

_LAYER = "model.layers.{layer}"
_ATTENTION = f"{_LAYER}.self_attn"


def _separate_qkv(kind: str) -> Rule:
    """Of three matrices or biases."""
    return Rule(
        f"{QKV_NAME}.{kind}", tuple(f"{_ATTENTION}.{one}_proj.{kind}" for one in "qkv"), QKV
    )


LLAMA_RULES = (
    Rule(EMBEDDING, ("model.embed_tokens.weight",), VOCABULARY),
    Rule(f"{QKV_NAME}.layer_norm_weight", (f"{_LAYER}.input_layernorm.weight",)),
    _separate_qkv("weight"),
    Rule(f"{PROJECTION}.weight", (f"{_ATTENTION}.o_proj.weight",)),
    Rule(f"{FC1}.layer_norm_weight", (f"{_LAYER}.post_attention_layernorm.weight",)),
    Rule(
        f"{FC1}.weight",
        (f"{_LAYER}.mlp.gate_proj.weight", f"{_LAYER}.mlp.up_proj.weight"),
        GATED_MLP,
    ),
    Rule(f"{FC2}.weight", (f"{_LAYER}.mlp.down_proj.weight",)),
    Rule(f"{FINAL_NORM}.weight", ("model.norm.weight",)),
    Rule(OUTPUT_LAYER, ("lm_head.weight",), VOCABULARY),
)
QWEN2_RULES = (*LLAMA_RULES, _separate_qkv("bias"))
QWEN3_RULES = (
    *LLAMA_RULES,
    *(
        Rule(
            f"decoder.layers.self_attention.{one}_layernorm.weight",
            (f"{_ATTENTION}.{one}_norm.weight",),
        )
        for one in "qk"
    ),
)


def _llama_config(args: Namespace, shape: ModelShape) -> Values:
    return {
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.head_dim,
        "rope_parameters": rope.to_hugging_face(args),
    }


def _llama_values(config: Any) -> Values:
    fields = config.to_dict()
    return {
        "group_query_attention": config.num_key_value_heads != config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": fields.get("head_dim") or config.hidden_size // config.num_attention_heads,
        "hidden_dropout": 0.0,
        **rope.to_megatron(config.rope_parameters),
    }


_LLAMA_NEEDS = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "add_bias_linear": False,
}
_SILU = {"hidden_act": ("silu", "swish")}

LLAMA = Family(
    name="Llama",
    model_type="llama",
    rules=LLAMA_RULES,
    needs=_LLAMA_NEEDS | {"add_qkv_bias": False, "qk_layernorm": False},
    demands=_SILU | {"attention_bias": (False,), "mlp_bias": (False,)},
    same={
        "ffn_hidden_size": "intermediate_size",
        "max_position_embeddings": "max_position_embeddings",
        "layernorm_epsilon": "rms_norm_eps",
        "attention_dropout": "attention_dropout",
    },
    to_config=_llama_config,
    from_config=_llama_values,
)
QWEN2 = replace(
    LLAMA,
    name="Qwen2",
    model_type="qwen2",
    rules=QWEN2_RULES,
    needs=_LLAMA_NEEDS | {"add_qkv_bias": True, "qk_layernorm": False},
    demands=_SILU | {"use_sliding_window": (False,)},
)
QWEN3 = replace(
    LLAMA,
    name="Qwen3",
    model_type="qwen3",
    rules=QWEN3_RULES,
    needs=_LLAMA_NEEDS | {"add_qkv_bias": False, "qk_layernorm": True},
    demands=_SILU | {"attention_bias": (False,), "use_sliding_window": (False,)},
)
