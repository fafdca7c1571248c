"""Llama, Qwen2, Qwen3: gated MLP, RMSNorm, rotary positions."""

from dataclasses import replace

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
    Rule,
)

_LAYER = "model.layers.{layer}"
_ATTENTION, _MLP = f"{_LAYER}.self_attn", f"{_LAYER}.mlp"


def _separate_qkv(kind: str) -> Rule:
    """Of three matrices or biases."""
    parts = tuple(f"{_ATTENTION}.{one}_proj.{kind}" for one in "qkv")
    return Rule(f"{QKV_NAME}.{kind}", parts, QKV)


LLAMA_RULES = (
    Rule(EMBEDDING, ("model.embed_tokens.weight",), VOCABULARY),
    Rule(f"{QKV_NAME}.layer_norm_weight", (f"{_LAYER}.input_layernorm.weight",)),
    _separate_qkv("weight"),
    Rule(f"{PROJECTION}.weight", (f"{_ATTENTION}.o_proj.weight",)),
    Rule(f"{FC1}.layer_norm_weight", (f"{_LAYER}.post_attention_layernorm.weight",)),
    Rule(f"{FC1}.weight", (f"{_MLP}.gate_proj.weight", f"{_MLP}.up_proj.weight"), GATED_MLP),
    Rule(f"{FC2}.weight", (f"{_MLP}.down_proj.weight",)),
    Rule(f"{FINAL_NORM}.weight", ("model.norm.weight",)),
    Rule(OUTPUT_LAYER, ("lm_head.weight",), VOCABULARY),
)

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
    to_config=lambda args, shape: {
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.head_dim,
        "rope_parameters": rope.to_hugging_face(args),
    },
    from_config=lambda config: {
        "group_query_attention": config.num_key_value_heads != config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        "hidden_dropout": 0.0,
        **rope.to_megatron(config.rope_parameters),
    },
)
QWEN2 = replace(
    LLAMA,
    name="Qwen2",
    model_type="qwen2",
    rules=(*LLAMA_RULES, _separate_qkv("bias")),
    needs=_LLAMA_NEEDS | {"add_qkv_bias": True, "qk_layernorm": False},
    demands=_SILU | {"use_sliding_window": (False,)},
)
QWEN3 = replace(
    LLAMA,
    name="Qwen3",
    model_type="qwen3",
    rules=(
        *LLAMA_RULES,
        Rule("decoder.layers.self_attention.q_layernorm.weight", (f"{_ATTENTION}.q_norm.weight",)),
        Rule("decoder.layers.self_attention.k_layernorm.weight", (f"{_ATTENTION}.k_norm.weight",)),
    ),
    needs=_LLAMA_NEEDS | {"add_qkv_bias": False, "qk_layernorm": True},
    demands=_SILU | {"attention_bias": (False,), "use_sliding_window": (False,)},
)
