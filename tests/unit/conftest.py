"""A checkpoint as Megatron writes it, made without Megatron from a random Llama."""

import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE, PADDED_VOCAB_SIZE = 11, 16
HEADS, GROUPS, HEAD_DIM = 4, 2, 4


@dataclass
class MadeCheckpoint:
    """What was saved, and the model that an export must give back."""

    save: Path
    state: dict[str, Any]
    model: LlamaForCausalLM

    @property
    def args(self) -> Namespace:
        return self.state["common_state/shard_0_1"][0]["args"]

    def write(self) -> None:
        """Write `state` as iteration 7; call again after changing it."""
        folder = self.save / "iter_0000007"
        folder.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            dcp.save(self.state, checkpoint_id=folder, planner=planner, no_dist=True)
        (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
        (self.save / "latest_checkpointed_iteration.txt").write_text("7")


@pytest.fixture
def made(tmp_path: Path) -> MadeCheckpoint:
    """An untied model with padded vocabulary, written to disk."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=HEAD_DIM,
        max_position_embeddings=32,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    model = LlamaForCausalLM(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    common = [{"args": megatron_args(), "iteration": 7}]
    state = pack(model) | {"common_state/shard_0_1": common, "rng_state/shard_0.0_1.1": [{}]}
    state["decoder.layers.mlp.linear_fc1._extra_state/shard_0_2"] = [None]
    state["optimizer.state.exp_avg.decoder.final_layernorm.weight"] = torch.zeros(8)
    made = MadeCheckpoint(tmp_path / "save", state, model)
    made.write()
    return made


def megatron_args(**changes: Any) -> Namespace:
    values = {
        "num_layers": 2,
        "hidden_size": 8,
        "ffn_hidden_size": 12,
        "num_attention_heads": HEADS,
        "group_query_attention": True,
        "num_query_groups": GROUPS,
        "kv_channels": HEAD_DIM,
        "max_position_embeddings": 32,
        "init_method_std": 0.02,
        "layernorm_epsilon": 1e-5,
        "rotary_base": 5000,
        "untie_embeddings_and_output_weights": True,
        "tokenizer_type": "NullTokenizer",
        "tokenizer_model": None,
        "vocab_size": VOCAB_SIZE,
        "padded_vocab_size": PADDED_VOCAB_SIZE,
        "pad_vocab_size": True,
        "make_vocab_size_divisible_by": 8,
        "tensor_model_parallel_size": 2,
        "normalization": "RMSNorm",
        "swiglu": True,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "add_bias_linear": False,
    }
    return Namespace(**values | changes)


def pack(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """Return Megatron's tensors of a Hugging Face model."""
    decoder, layers = model.model, model.model.layers

    def stack(make: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        return torch.stack([make(layer).detach() for layer in layers])

    def padded(table: torch.Tensor) -> torch.Tensor:
        return torch.cat([table, torch.zeros(PADDED_VOCAB_SIZE - len(table), 8)]).detach()

    return {
        "embedding.word_embeddings.weight": padded(decoder.embed_tokens.weight),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": stack(
            lambda layer: layer.input_layernorm.weight
        ),
        "decoder.layers.self_attention.linear_qkv.weight": stack(fused_qkv),
        "decoder.layers.self_attention.linear_proj.weight": stack(
            lambda layer: layer.self_attn.o_proj.weight
        ),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": stack(
            lambda layer: layer.post_attention_layernorm.weight
        ),
        "decoder.layers.mlp.linear_fc1.weight": stack(
            lambda layer: torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])
        ),
        "decoder.layers.mlp.linear_fc2.weight": stack(lambda layer: layer.mlp.down_proj.weight),
        "decoder.final_layernorm.weight": decoder.norm.weight.detach(),
        "output_layer.weight": padded(model.lm_head.weight),
    }


def fused_qkv(layer: Any) -> torch.Tensor:
    attention = layer.self_attn
    query = attention.q_proj.weight.split(HEAD_DIM)
    key, value = (p.weight.split(HEAD_DIM) for p in (attention.k_proj, attention.v_proj))
    per_group = HEADS // GROUPS
    rows: list[torch.Tensor] = []
    for group in range(GROUPS):
        rows += [*query[group * per_group : (group + 1) * per_group], key[group], value[group]]
    return torch.cat(rows)
