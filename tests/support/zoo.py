"""Tiny models with random weights of every kind of causal language model that transformers has."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

WIDTH, LAYERS, HEADS, LENGTH, VOCAB = 32, 2, 4, 64, 256
SIZES: dict[int, str] = {
    VOCAB: "vocab_size vocab_size_per_layer_input",
    WIDTH: "hidden_size d_model n_embd dim word_embed_proj_dim lru_width attention_hidden_size "
    "embedding_size num_buckets",
    LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
    "num_key_value_heads num_experts num_local_experts n_routed_experts moe_num_experts "
    "linear_num_key_heads linear_num_value_heads adapter_layers",
    HEADS: "num_attention_heads n_head n_heads num_heads decoder_attention_heads rotary_dim "
    "encoder_attention_heads qk_rope_head_dim qk_nope_head_dim mamba_d_state mamba_n_heads "
    "mamba_num_heads state_size ssm_state_size",
    LENGTH: "max_position_embeddings n_positions n_ctx max_seq_len context_length "
    "intermediate_size ffn_dim d_ff n_inner decoder_ffn_dim encoder_ffn_dim d_inner "
    "ffn_hidden_size",
    16: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
    "mamba_d_head mamba_head_dim",
    8: "head_dim kv_lora_rank q_lora_rank v_head_dim qk_head_dim "
    "linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input attention_head_dim",
    18: "sliding_window attention_window attention_chunk_size",
    1: "num_experts_per_tok moe_topk moe_k n_shared_experts n_group topk_group max_window_layers "
    "first_k_dense_replace n_groups global_attn_every_n_layers bos_token_id",
    2: "eos_token_id",
    0: "pad_token_id use_mamba_kernels num_kv_shared_layers",
}


LARGEST = 30_000_000
"""Parameters: what could not be made small is not made."""


def tiny_model(kind: str) -> Any:
    """A model of a kind (`config.model_type`) in float32 that runs.

    Raises ValueError if no way to shrink it is known.
    """
    known = CONFIG_MAPPING[kind]().to_dict()
    sizes = {name: size for size, names in SIZES.items() for name in names.split()}
    given = {name: size for name, size in sizes.items() if name in known}
    equal = given | {"num_key_value_heads": HEADS}
    ways = [given, equal] if "num_key_value_heads" in known else [given]
    ways += [{n: v for n, v in way.items() if n != "head_dim"} for way in ways]
    reasons = []
    for make in [lambda w=way: CONFIG_MAPPING[kind](**w) for way in ways] + [
        lambda: _cut(kind, given)
    ]:
        try:
            return _built(make())
        except Exception as error:  # transformers has a kind for each model
            reasons.append(repr(error)[:100])
    raise ValueError(f"{kind}: {reasons}")


def _cut(kind: str, sizes: dict[str, int]) -> Any:
    """Its usual configuration, made smaller afterwards."""
    config = CONFIG_MAPPING[kind]()
    for part in (config, config.get_text_config()):
        for name, size in sizes.items():
            if getattr(part, name, None) is not None:
                setattr(part, name, size)
        for name, value in list(vars(part).items()):
            if isinstance(value, list) and len(value) > LAYERS and "layer" in name:
                setattr(part, name, value[:LAYERS])
    return config


def _built(config: Any) -> Any:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if sum(weight.numel() for weight in model.parameters()) > LARGEST:
        raise ValueError("too large")
    model = _random(config)
    apart = torch.zeros(1, 1, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -1e30)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 12)[None], use_cache=False)
        if hasattr(config.get_text_config(), "num_key_value_heads"):
            model(input_ids=torch.arange(3, 12)[None], attention_mask=apart, use_cache=False)
    return _random(config)  # RWKV's weights are others once they were used


def _random(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
