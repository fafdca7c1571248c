"""What a run's arguments say of the model: whether it is a Llama, and its `config.json`."""

from argparse import Namespace
from typing import Any, NamedTuple

from transformers import LlamaConfig

from megatron_let.conversion.mapping import ModelShape
from megatron_let.errors import UsageError


class Need(NamedTuple):
    """An argument that must have one value for Llama to compute the same."""

    attribute: str
    flag: str
    value: Any


NEEDS = (
    Need("normalization", "--normalization", "RMSNorm"),
    Need("swiglu", "--swiglu", True),
    Need("position_embedding_type", "--position-embedding-type", "rope"),
    Need("rotary_percent", "--rotary-percent", 1.0),
    Need("rotary_interleaved", "--rotary-interleaved", False),
    Need("add_bias_linear", "--disable-bias-linear", False),
    Need("softmax_type", "--softmax-type", "vanilla"),
)

MUST_BE_OFF = {
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "rotary_seq_len_interpolation_factor": "--rotary-seq-len-interpolation-factor",
} | {
    attribute: "--" + attribute.replace("_", "-")
    for attribute in (
        "activation_func_clamp_value add_qkv_bias apply_residual_connection_post_layernorm "
        "attention_output_gate experimental_attention_variant glu_linear_offset "
        "heterogeneous_layers_config_encoded_json heterogeneous_layers_config_path "
        "hybrid_layer_pattern hybrid_override_pattern is_hybrid_model linear_attention_freq "
        "mtp_num_layers multi_latent_attention no_rope_freq num_experts openai_gelu qk_l2_norm "
        "qk_layernorm quick_geglu spec squared_relu use_mup use_rope_scaling window_size"
    ).split()
}
"""Arguments that change what the model computes, and their flags."""


def check_is_llama(args: Namespace) -> None:
    """Refuse a model that Megatron computes in another way than Hugging Face's Llama.

    Raises:
        UsageError: names the first flag that is in the way, and its value.
    """
    values = vars(args)
    for need in NEEDS:
        # A version of Megatron that lacks an argument lacks the feature, too.
        value = values.get(need.attribute, need.value)
        if value != need.value:
            raise UsageError(
                f"{need.flag} ({need.attribute}={value!r}) cannot be exported: a Llama has "
                f"{need.attribute}={need.value!r}."
            )
    for attribute, flag in MUST_BE_OFF.items():
        if values.get(attribute):
            raise UsageError(f"{flag} {values[attribute]} cannot be exported: a Llama has no such.")


def check_vocabulary(args: Namespace, vocab_size: int) -> None:
    """Refuse a tokenizer whose size, padded as Megatron pads it, is not that of the run's table.

    Raises:
        UsageError: names both sizes.
    """
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    padded = -(-vocab_size // multiple) * multiple if args.pad_vocab_size else vocab_size
    if args.padded_vocab_size != padded:
        raise UsageError(
            f"--tokenizer-model has {vocab_size} tokens, padded to {padded} rows; the run's model "
            f"has {args.padded_vocab_size}. Give the tokenizer of the run. If the run set "
            f"--padded-vocab-size, put its tokenizer where the run had it: {args.tokenizer_model}."
        )


def model_shape(args: Namespace, vocab_size: int) -> ModelShape:
    """Return the sizes of the run's model, whose tokenizer has `vocab_size` tokens."""
    heads = args.num_attention_heads
    return ModelShape(
        num_layers=args.num_layers,
        num_heads=heads,
        # Without --group-query-attention Megatron leaves a 1 there that it does not use.
        num_query_groups=args.num_query_groups if args.group_query_attention else heads,
        head_dim=args.kv_channels,
        vocab_size=vocab_size,
    )


def llama_config(args: Namespace, shape: ModelShape, tokenizer: Any | None) -> LlamaConfig:
    """Return Hugging Face's configuration of the run's model.

    Raises:
        UsageError: the model is no Llama.
    """
    check_is_llama(args)
    if args.hidden_size % shape.num_heads:
        raise UsageError(
            f"--hidden-size {args.hidden_size} is not a multiple of --num-attention-heads "
            f"{shape.num_heads}, which Hugging Face's Llama demands."
        )
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_query_groups,
        head_dim=shape.head_dim,
        max_position_embeddings=args.max_position_embeddings,
        initializer_range=args.init_method_std,
        rms_norm_eps=args.layernorm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": float(args.rotary_base)},
        tie_word_embeddings=not args.untie_embeddings_and_output_weights,
        # Llama's own ids are the defaults; without a tokenizer none is right.
        bos_token_id=tokenizer.bos_token_id if tokenizer is not None else None,
        eos_token_id=tokenizer.eos_token_id if tokenizer is not None else None,
        pad_token_id=tokenizer.pad_token_id if tokenizer is not None else None,
    )
    # Readers older than transformers 5 know this name only, and would fall back to 10000.
    config.rope_theta = float(args.rotary_base)
    return config
