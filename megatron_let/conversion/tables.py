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


_LAYERS = "decoder.layers"
_LAYER = "model.layers.{layer}"

LLAMA = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), VOCABULARY),
    Rule(
        f"{_LAYERS}.self_attention.linear_qkv.layer_norm_weight",
        (f"{_LAYER}.input_layernorm.weight",),
    ),
    Rule(
        f"{_LAYERS}.self_attention.linear_qkv.weight",
        tuple(f"{_LAYER}.self_attn.{letter}_proj.weight" for letter in "qkv"),
        QKV,
    ),
    Rule(f"{_LAYERS}.self_attention.linear_proj.weight", (f"{_LAYER}.self_attn.o_proj.weight",)),
    Rule(
        f"{_LAYERS}.mlp.linear_fc1.layer_norm_weight",
        (f"{_LAYER}.post_attention_layernorm.weight",),
    ),
    Rule(
        f"{_LAYERS}.mlp.linear_fc1.weight",
        (f"{_LAYER}.mlp.gate_proj.weight", f"{_LAYER}.mlp.up_proj.weight"),
        GATED_MLP,
    ),
    Rule(f"{_LAYERS}.mlp.linear_fc2.weight", (f"{_LAYER}.mlp.down_proj.weight",)),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Rule(OUTPUT_LAYER, ("lm_head.weight",), VOCABULARY),
)

QWEN2 = (
    *LLAMA,
    Rule(
        f"{_LAYERS}.self_attention.linear_qkv.bias",
        tuple(f"{_LAYER}.self_attn.{letter}_proj.bias" for letter in "qkv"),
        QKV,
    ),
)

QWEN3 = (
    *LLAMA,
    Rule(f"{_LAYERS}.self_attention.q_layernorm.weight", (f"{_LAYER}.self_attn.q_norm.weight",)),
    Rule(f"{_LAYERS}.self_attention.k_layernorm.weight", (f"{_LAYER}.self_attn.k_norm.weight",)),
)


_BLOCK = "transformer.h.{layer}"

GPT2 = (
    Rule("embedding.word_embeddings.weight", ("transformer.wte.weight",), VOCABULARY),
    Rule("embedding.position_embeddings.weight", ("transformer.wpe.weight",)),
    *_with_bias(f"{_LAYERS}.self_attention.linear_qkv.layer_norm_{{}}", f"{_BLOCK}.ln_1.{{}}"),
    *_with_bias(
        f"{_LAYERS}.self_attention.linear_qkv.{{}}", f"{_BLOCK}.attn.c_attn.{{}}", QKV_COLUMNS
    ),
    *_with_bias(
        f"{_LAYERS}.self_attention.linear_proj.{{}}", f"{_BLOCK}.attn.c_proj.{{}}", TRANSPOSED
    ),
    *_with_bias(f"{_LAYERS}.mlp.linear_fc1.layer_norm_{{}}", f"{_BLOCK}.ln_2.{{}}"),
    *_with_bias(f"{_LAYERS}.mlp.linear_fc1.{{}}", f"{_BLOCK}.mlp.c_fc.{{}}", TRANSPOSED),
    *_with_bias(f"{_LAYERS}.mlp.linear_fc2.{{}}", f"{_BLOCK}.mlp.c_proj.{{}}", TRANSPOSED),
    *_with_bias("decoder.final_layernorm.{}", "transformer.ln_f.{}"),
    Rule(OUTPUT_LAYER, ("lm_head.weight",), VOCABULARY),
)


_NEOX = "gpt_neox.layers.{layer}"

GPT_NEOX = (
    Rule("embedding.word_embeddings.weight", ("gpt_neox.embed_in.weight",), VOCABULARY),
    *_with_bias(
        f"{_LAYERS}.self_attention.linear_qkv.layer_norm_{{}}", f"{_NEOX}.input_layernorm.{{}}"
    ),
    # Each head's query, key and value stand together there too: Megatron's order without groups.
    *_with_bias(
        f"{_LAYERS}.self_attention.linear_qkv.{{}}", f"{_NEOX}.attention.query_key_value.{{}}"
    ),
    *_with_bias(f"{_LAYERS}.self_attention.linear_proj.{{}}", f"{_NEOX}.attention.dense.{{}}"),
    *_with_bias(
        f"{_LAYERS}.mlp.linear_fc1.layer_norm_{{}}", f"{_NEOX}.post_attention_layernorm.{{}}"
    ),
    *_with_bias(f"{_LAYERS}.mlp.linear_fc1.{{}}", f"{_NEOX}.mlp.dense_h_to_4h.{{}}"),
    *_with_bias(f"{_LAYERS}.mlp.linear_fc2.{{}}", f"{_NEOX}.mlp.dense_4h_to_h.{{}}"),
    *_with_bias("decoder.final_layernorm.{}", "gpt_neox.final_layer_norm.{}"),
    Rule(OUTPUT_LAYER, ("embed_out.weight",), VOCABULARY),
)
