"""Which tensor of Megatron's is which of Hugging Face's: one table a family."""

from megatron_let.conversion.mapping import (
    GATED_MLP,
    KEEP,
    OUTPUT_LAYER,
    QKV,
    QKV_COLUMNS,
    TRANSPOSED,
    VOCABULARY,
    Form,
    Rule,
)


def _with_bias(megatron: str, hugging_face: str, form: Form = KEEP) -> tuple[Rule, Rule]:
    """A matrix or a norm and its bias; `{}` takes "weight" and "bias"."""
    weight, bias = (
        Rule(megatron.format(kind), (hugging_face.format(kind, layer="{layer}"),), form)
        for kind in ("weight", "bias")
    )
    return weight, bias


_QKV = "decoder.layers.self_attention.linear_qkv"
_PROJECTION = "decoder.layers.self_attention.linear_proj"
_FC1, _FC2 = "decoder.layers.mlp.linear_fc1", "decoder.layers.mlp.linear_fc2"
_EMBEDDING = "embedding.word_embeddings.weight"
_FINAL_NORM = "decoder.final_layernorm"

# --- Llama, Qwen2, Qwen3 -----------------------------------------------------------------------

_LAYER = "model.layers.{layer}"
_ATTENTION = f"{_LAYER}.self_attn"


def _separate_qkv(kind: str) -> Rule:
    """Of three matrices or biases."""
    return Rule(f"{_QKV}.{kind}", tuple(f"{_ATTENTION}.{one}_proj.{kind}" for one in "qkv"), QKV)


LLAMA = (
    Rule(_EMBEDDING, ("model.embed_tokens.weight",), VOCABULARY),
    Rule(f"{_QKV}.layer_norm_weight", (f"{_LAYER}.input_layernorm.weight",)),
    _separate_qkv("weight"),
    Rule(f"{_PROJECTION}.weight", (f"{_ATTENTION}.o_proj.weight",)),
    Rule(f"{_FC1}.layer_norm_weight", (f"{_LAYER}.post_attention_layernorm.weight",)),
    Rule(
        f"{_FC1}.weight",
        (f"{_LAYER}.mlp.gate_proj.weight", f"{_LAYER}.mlp.up_proj.weight"),
        GATED_MLP,
    ),
    Rule(f"{_FC2}.weight", (f"{_LAYER}.mlp.down_proj.weight",)),
    Rule(f"{_FINAL_NORM}.weight", ("model.norm.weight",)),
    Rule(OUTPUT_LAYER, ("lm_head.weight",), VOCABULARY),
)
QWEN2 = (*LLAMA, _separate_qkv("bias"))
QWEN3 = (
    *LLAMA,
    *(
        Rule(
            f"decoder.layers.self_attention.{one}_layernorm.weight",
            (f"{_ATTENTION}.{one}_norm.weight",),
        )
        for one in "qk"
    ),
)

# --- GPT-2, GPT-NeoX ---------------------------------------------------------------------------

_BLOCK = "transformer.h.{layer}"

GPT2 = (
    Rule(_EMBEDDING, ("transformer.wte.weight",), VOCABULARY),
    Rule("embedding.position_embeddings.weight", ("transformer.wpe.weight",)),
    *_with_bias(f"{_QKV}.layer_norm_{{}}", f"{_BLOCK}.ln_1.{{}}"),
    *_with_bias(f"{_QKV}.{{}}", f"{_BLOCK}.attn.c_attn.{{}}", QKV_COLUMNS),
    *_with_bias(f"{_PROJECTION}.{{}}", f"{_BLOCK}.attn.c_proj.{{}}", TRANSPOSED),
    *_with_bias(f"{_FC1}.layer_norm_{{}}", f"{_BLOCK}.ln_2.{{}}"),
    *_with_bias(f"{_FC1}.{{}}", f"{_BLOCK}.mlp.c_fc.{{}}", TRANSPOSED),
    *_with_bias(f"{_FC2}.{{}}", f"{_BLOCK}.mlp.c_proj.{{}}", TRANSPOSED),
    *_with_bias(f"{_FINAL_NORM}.{{}}", "transformer.ln_f.{}"),
    Rule(OUTPUT_LAYER, ("lm_head.weight",), VOCABULARY),
)

_NEOX = "gpt_neox.layers.{layer}"

GPT_NEOX = (
    Rule(_EMBEDDING, ("gpt_neox.embed_in.weight",), VOCABULARY),
    *_with_bias(f"{_QKV}.layer_norm_{{}}", f"{_NEOX}.input_layernorm.{{}}"),
    # Each head's query, key and value stand together there too: Megatron's order without groups.
    *_with_bias(f"{_QKV}.{{}}", f"{_NEOX}.attention.query_key_value.{{}}"),
    *_with_bias(f"{_PROJECTION}.{{}}", f"{_NEOX}.attention.dense.{{}}"),
    *_with_bias(f"{_FC1}.layer_norm_{{}}", f"{_NEOX}.post_attention_layernorm.{{}}"),
    *_with_bias(f"{_FC1}.{{}}", f"{_NEOX}.mlp.dense_h_to_4h.{{}}"),
    *_with_bias(f"{_FC2}.{{}}", f"{_NEOX}.mlp.dense_4h_to_h.{{}}"),
    *_with_bias(f"{_FINAL_NORM}.{{}}", "gpt_neox.final_layer_norm.{}"),
    Rule(OUTPUT_LAYER, ("embed_out.weight",), VOCABULARY),
)
