"""A model's configuration, from Megatron's arguments to Hugging Face's and back."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_let.conversion.families import FAMILIES
from megatron_let.conversion.family import Family, ModelShape, Values
from megatron_let.errors import UsageError


def _flags(attributes: str) -> dict[str, str]:
    return {name: "--" + name.replace("_", "-") for name in attributes.split()}


NEEDED_BY_ALL = {"rotary_interleaved": False, "softmax_type": "vanilla", "no_rope_freq": None}
MUST_BE_OFF = {"layernorm_zero_centered_gamma": "--apply-layernorm-1p"} | _flags(
    "activation_func_clamp_value apply_residual_connection_post_layernorm attention_output_gate "
    "experimental_attention_variant glu_linear_offset heterogeneous_layers_config_encoded_json "
    "heterogeneous_layers_config_path hybrid_layer_pattern hybrid_override_pattern "
    "is_hybrid_model linear_attention_freq mtp_num_layers multi_latent_attention "
    "num_experts openai_gelu qk_l2_norm quick_geglu spec squared_relu use_mup window_size"
)
"""Arguments that change what the model computes as no family does, and their flags."""


def family_of_run(args: Namespace) -> Family:
    """Return the architecture that a run's arguments describe, or name the first in the way."""
    values = vars(args)
    for attribute, flag in MUST_BE_OFF.items():
        if values.get(attribute):
            raise UsageError(
                f"{flag} {values[attribute]} cannot be exported: none of {_names()} has that."
            )
    nearest = min(FAMILIES, key=lambda family: len(_unmet(family, values)))
    for attribute, value in _unmet(nearest, values).items():
        raise UsageError(
            f"{attribute}={values[attribute]!r} ({FLAG_OF[attribute]}) cannot be exported: "
            f"{nearest.name}, the nearest of {_names()}, has {attribute}={value!r}."
        )
    return nearest


def _names() -> str:
    return ", ".join(family.name for family in FAMILIES)


def _unmet(family: Family, values: Mapping[str, Any]) -> Values:
    needs = {**NEEDED_BY_ALL, **family.needs}
    # A version of Megatron that lacks an argument lacks the feature, too.
    return {name: need for name, need in needs.items() if values.get(name, need) != need}


def model_shape(args: Namespace, vocab_size: int) -> ModelShape:
    """Return the sizes of the run's model, of whose table `vocab_size` rows have a token."""
    heads = args.num_attention_heads
    return ModelShape(
        num_layers=args.num_layers,
        num_heads=heads,
        # Without --group-query-attention Megatron leaves a 1 there that it does not use.
        num_query_groups=args.num_query_groups if args.group_query_attention else heads,
        head_dim=args.kv_channels,
        vocab_size=vocab_size,
    )


def hugging_face_config(
    family: Family, args: Namespace, shape: ModelShape, tokenizer: Any | None
) -> Any:
    """Return transformers' configuration of the run's model."""
    # Dropout is for training on; a checkpoint's arguments may lack it.
    values = {"attention_dropout": 0.0, "hidden_dropout": 0.0} | vars(args)
    own = {field: values[name] for name, field in family.same.items()}
    own |= family.to_config(args, shape)
    head_dim = shape.head_dim if "head_dim" not in own else args.hidden_size // shape.num_heads
    if head_dim * shape.num_heads != args.hidden_size:
        raise UsageError(
            f"--hidden-size {args.hidden_size} with {shape.num_heads} --num-attention-heads of "
            f"--kv-channels {shape.head_dim} cannot be exported to Hugging Face's {family.name}: "
            f"{shape.num_heads} heads of {head_dim} make {head_dim * shape.num_heads}."
        )
    # The families' own ids are the defaults; without a tokenizer, or a row for it, none is right.
    tokens = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        index = getattr(tokenizer, name, None)
        tokens[name] = index if index in range(shape.vocab_size) else None
    return AutoConfig.for_model(
        family.model_type,
        vocab_size=shape.vocab_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        initializer_range=args.init_method_std,
        tie_word_embeddings=not args.untie_embeddings_and_output_weights,
        **own,
        **tokens,
    )


def empty_model(config: Any) -> Any:
    """Return transformers' model of a configuration, on `meta`."""
    # Not what it may ask for: a type of FP8, a package of kernels that is not here.
    plain = {"dtype": torch.float32, "attn_implementation": "eager"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **plain)


def family_of_config(config: Any) -> Family:
    """Return a model's architecture; refuse one, or an option, that Megatron does not compute."""
    family = next((f for f in FAMILIES if f.model_type == config.model_type), None)
    if family is None:
        raise UsageError(f"model_type {config.model_type!r} is none of {_names()}.")
    fields = config.to_dict()
    for name, accepted in {**family.demands, "is_causal": (True,)}.items():
        if fields.get(name, accepted[0]) not in accepted:
            raise UsageError(
                f"{name}={fields[name]!r} cannot be converted: Megatron's layers compute "
                f"{' or '.join(f'{name}={value!r}' for value in accepted)} only."
            )
    return family


def megatron_values(family: Family, config: Any) -> Values:
    """Return the arguments of a run that computes the same as a Hugging Face model."""
    heads = config.num_attention_heads
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": heads,
        "group_query_attention": False,
        "num_query_groups": heads,
        "kv_channels": config.hidden_size // heads,
        "init_method_std": config.initializer_range,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        **NEEDED_BY_ALL,
        **family.needs,
        **{name: getattr(config, field) for name, field in family.same.items()},
        **family.from_config(config),
    }


FLAG_OF = _flags(
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels "
    "max_position_embeddings position_embedding_type normalization init_method_std "
    "rotary_base rotary_percent rotary_seq_len_interpolation_factor rope_scaling_factor "
    "use_rope_scaling no_rope_freq rotary_interleaved softmax_type group_query_attention swiglu "
    "attention_dropout hidden_dropout use_te_activation_func use_transformer_engine_op_fuser "
    "add_qkv_bias qk_layernorm untie_embeddings_and_output_weights"
) | {
    "layernorm_epsilon": "--norm-epsilon",
    "add_bias_linear": "--disable-bias-linear",
    "bias_gelu_fusion": "--no-bias-gelu-fusion",
}


def megatron_flags(values: Mapping[str, Any]) -> list[str]:
    """Return arguments as the words of a command line."""
    if not values["group_query_attention"]:
        values = {**values, "num_query_groups": None}
    words: list[str] = []
    for attribute, flag in FLAG_OF.items():
        value = values.get(attribute)
        if isinstance(value, bool):
            turns_off = flag.startswith(("--no-", "--disable-"))
            words += [flag] * (value != turns_off)
        elif value is not None:
            words += [flag, str(value)]
    return words
