"""The families that are converted; add one with `add_family` (docs/extending.md)."""

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
    QKV_COLUMNS,
    QKV_NAME,
    TRANSPOSED,
    VOCABULARY,
    Family,
    Rule,
    Values,
    with_bias,
)
from megatron_let.errors import UsageError

# --- Llama and its kin: gated MLP, RMSNorm, rotary positions -----------------------------------

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

_SILU = {"hidden_act": ("silu", "swish")}

LLAMA = Family(
    name="Llama",
    model_type="llama",
    rules=LLAMA_RULES,
    needs={
        "normalization": "RMSNorm",
        "swiglu": True,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
    },
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
    needs={**LLAMA.needs, "add_qkv_bias": True},
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
    needs={**LLAMA.needs, "qk_layernorm": True},
    demands=_SILU | {"attention_bias": (False,), "use_sliding_window": (False,)},
)
MISTRAL = replace(
    LLAMA,
    name="Mistral",
    model_type="mistral",
    demands=_SILU | {"sliding_window": (None,)},
)
_ONE_IN_FOUR = [1, 1, 1, 0]


def _smollm3_values(config: Any) -> Values:
    if config.no_rope_layers != _ONE_IN_FOUR * (config.num_hidden_layers // 4):
        raise UsageError(
            f"no_rope_layers={config.no_rope_layers} of {config.num_hidden_layers} layers cannot "
            f"be converted: only {_ONE_IN_FOUR} again and again, which is --no-rope-freq 4."
        )
    return LLAMA.from_config(config)


SMOLLM3 = replace(
    LLAMA,
    name="SmolLM3",
    model_type="smollm3",
    needs={**LLAMA.needs, "no_rope_freq": len(_ONE_IN_FOUR)},
    demands={**LLAMA.demands, "sliding_window": (None,)},
    from_config=_smollm3_values,
)

# --- GPT-2 and GPT-NeoX: plain MLP with GELU, LayerNorm, biases ----------------------------------

_BLOCK, _NEOX = "transformer.h.{layer}", "gpt_neox.layers.{layer}"
# Megatron fuses a bias with the tanh form of GELU; without the fusion it computes the exact one.
# Its --openai-gelu is parsed and then forgotten in Megatron-Core 0.19, but not in older ones.
_EXACT_GELU, _TANH_GELU = "gelu", "gelu_new"
_GELUS = (_EXACT_GELU, _TANH_GELU, "gelu_pytorch_tanh", "gelu_fast")


def _gelu(args: Namespace) -> str:
    return _TANH_GELU if args.bias_gelu_fusion else _EXACT_GELU


_GPT_NEEDS = {
    "normalization": "LayerNorm",
    "swiglu": False,
    "add_bias_linear": True,
    "qk_layernorm": False,
    "group_query_attention": False,
    # Transformer Engine's own GELU is the tanh form, whatever --no-bias-gelu-fusion says.
    "use_te_activation_func": False,
    "use_transformer_engine_op_fuser": False,
}

GPT2 = Family(
    name="GPT-2",
    model_type="gpt2",
    rules=(
        Rule(EMBEDDING, ("transformer.wte.weight",), VOCABULARY),
        Rule("embedding.position_embeddings.weight", ("transformer.wpe.weight",)),
        *with_bias(f"{QKV_NAME}.layer_norm_{{}}", f"{_BLOCK}.ln_1.{{}}"),
        *with_bias(f"{QKV_NAME}.{{}}", f"{_BLOCK}.attn.c_attn.{{}}", QKV_COLUMNS),
        *with_bias(f"{PROJECTION}.{{}}", f"{_BLOCK}.attn.c_proj.{{}}", TRANSPOSED),
        *with_bias(f"{FC1}.layer_norm_{{}}", f"{_BLOCK}.ln_2.{{}}"),
        *with_bias(f"{FC1}.{{}}", f"{_BLOCK}.mlp.c_fc.{{}}", TRANSPOSED),
        *with_bias(f"{FC2}.{{}}", f"{_BLOCK}.mlp.c_proj.{{}}", TRANSPOSED),
        *with_bias(f"{FINAL_NORM}.{{}}", "transformer.ln_f.{}"),
        Rule(OUTPUT_LAYER, ("lm_head.weight",), VOCABULARY),
    ),
    needs=_GPT_NEEDS | {"position_embedding_type": "learned_absolute"},
    demands={
        "activation_function": _GELUS,
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    same={
        "ffn_hidden_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "layernorm_epsilon": "layer_norm_epsilon",
        "attention_dropout": "attn_pdrop",
        "hidden_dropout": "resid_pdrop",
    },
    to_config=lambda args, shape: {
        "activation_function": _gelu(args),
        "embd_pdrop": vars(args).get("hidden_dropout", 0.0),
    },
    from_config=lambda config: {
        "ffn_hidden_size": config.n_inner or 4 * config.n_embd,
        "bias_gelu_fusion": config.activation_function != _EXACT_GELU,
    },
)
GPT_NEOX = Family(
    name="GPT-NeoX",
    model_type="gpt_neox",
    rules=(
        Rule(EMBEDDING, ("gpt_neox.embed_in.weight",), VOCABULARY),
        *with_bias(f"{QKV_NAME}.layer_norm_{{}}", f"{_NEOX}.input_layernorm.{{}}"),
        # Each head's query, key and value stand together: Megatron's own order without groups.
        *with_bias(f"{QKV_NAME}.{{}}", f"{_NEOX}.attention.query_key_value.{{}}"),
        *with_bias(f"{PROJECTION}.{{}}", f"{_NEOX}.attention.dense.{{}}"),
        *with_bias(f"{FC1}.layer_norm_{{}}", f"{_NEOX}.post_attention_layernorm.{{}}"),
        *with_bias(f"{FC1}.{{}}", f"{_NEOX}.mlp.dense_h_to_4h.{{}}"),
        *with_bias(f"{FC2}.{{}}", f"{_NEOX}.mlp.dense_4h_to_h.{{}}"),
        *with_bias(f"{FINAL_NORM}.{{}}", "gpt_neox.final_layer_norm.{}"),
        Rule(OUTPUT_LAYER, ("embed_out.weight",), VOCABULARY),
    ),
    needs=_GPT_NEEDS | {"position_embedding_type": "rope"},
    # With a parallel residual, as Pythia has it, attention and MLP read the same states.
    demands={"hidden_act": _GELUS, "use_parallel_residual": (False,), "attention_bias": (True,)},
    same={
        "ffn_hidden_size": "intermediate_size",
        "max_position_embeddings": "max_position_embeddings",
        "layernorm_epsilon": "layer_norm_eps",
        "attention_dropout": "attention_dropout",
        "hidden_dropout": "hidden_dropout",
    },
    to_config=lambda args, shape: {
        "hidden_act": _gelu(args),
        "rope_parameters": rope.to_hugging_face(args)
        | {"partial_rotary_factor": args.rotary_percent},
        "use_parallel_residual": False,
    },
    from_config=lambda config: {
        "bias_gelu_fusion": config.hidden_act != _EXACT_GELU,
        "rotary_percent": config.rope_parameters["partial_rotary_factor"],
        **rope.to_megatron(config.rope_parameters),
    },
)


FAMILIES = [LLAMA, QWEN2, QWEN3, MISTRAL, SMOLLM3, GPT2, GPT_NEOX]
"""A run whose arguments are those of several is exported as the first: a Mistral as a Llama."""


def add_family(family: Family) -> None:
    """Convert one more architecture; a UsageError if its `model_type` is known already."""
    if family.model_type in (known.model_type for known in FAMILIES):
        raise UsageError(f"There is a family for model_type {family.model_type} already.")
    FAMILIES.append(family)
