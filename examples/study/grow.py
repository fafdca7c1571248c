"""Grow a small Llama into the shape of a larger one that computes the same, or nearly.

A width d becomes D, a number of heads (of the same size) and an FFN grow alike:

- what writes to the residual stream (embedding, o, down) gets rows of zeros, so the new D - d
  features are zero all along, and columns of zeros for the new heads and FFN features;
- what reads from it (q, k, v, gate, up) gets random rows and columns: they meet zeros, and their
  gradients part;
- RMSNorm divides by the root mean square over D features, d of which are not zero: its weight
  shrinks by sqrt(d / D), its epsilon by d / D.

Depth: `identity` puts a new layer that adds nothing (o and down zero) behind each old one, which is
exact; `stack` repeats the whole teacher, `interleave` each of its layers: not exact. Embeddings are
tied. Until there is a tool in the package.
"""

import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from examples.quickstart.run import Model

INIT_STD = 0.02
"""Megatron's."""
TOLERANCE = 2e-5
"""Of exact growth: the largest difference of a logit, in units of the largest logit; float32."""
WRITERS = ("o_proj", "down_proj")


def grow_model(
    teacher: Path, output: Path, shape: Model, depth: str, *, trained: bool = True
) -> Path:
    """Write the teacher, grown into `shape`, as a Hugging Face folder; returns `output`.

    `trained=False` grows an untrained model of the teacher's shape. What should be exact is checked
    first. Raises ValueError if it is not, or the shapes do not allow it.
    """
    source = AutoModelForCausalLM.from_pretrained(
        teacher, dtype=torch.float32, trust_remote_code=False
    )
    if not trained:
        torch.manual_seed(0)
        source = LlamaForCausalLM(source.config)
    grown = grow(source, shape, "identity")
    difference = relative_difference(source, grown)
    if not difference <= TOLERANCE:
        raise ValueError(f"{teacher}, grown, differs by {difference:.1e} of the largest logit")
    if depth != "identity":
        grown = grow(source, shape, depth)
    grown.save_pretrained(output)
    AutoTokenizer.from_pretrained(teacher, trust_remote_code=False).save_pretrained(output)
    return output


@torch.no_grad()
def grow(source: LlamaForCausalLM, shape: Model, depth: str, seed: int = 0) -> LlamaForCausalLM:
    """Return the grown model; random parts come from `seed`.

    Raises ValueError if the source's heads, width or layers do not fit into `shape`.
    """
    old = source.config
    _check(old, shape)
    torch.manual_seed(seed)
    grown = LlamaForCausalLM(grown_config(old, shape))
    for weight in grown.parameters():
        weight.copy_(torch.randn_like(weight) * INIT_STD)
    layers = source.model.layers
    for index, origin in enumerate(depth_map(len(layers), shape.layers, depth)):
        new = grown.model.layers[index]
        _grow_module(layers[0 if origin is None else origin], new)
        if origin is None:
            new.self_attn.o_proj.weight.zero_()
            new.mlp.down_proj.weight.zero_()
    _place(source.model.embed_tokens.weight, grown.model.embed_tokens.weight.zero_())
    _grow_norm(source.model.norm.weight, grown.model.norm.weight)
    return grown.eval()


def grown_config(old: LlamaConfig, shape: Model) -> LlamaConfig:
    """The configuration of the grown model."""
    new = old.to_dict() | {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "rms_norm_eps": old.rms_norm_eps * old.hidden_size / shape.hidden,
    }
    return LlamaConfig(**new)


def depth_map(old: int, new: int, how: str) -> list[int | None]:
    """Say for each new layer which old one it is; None: a layer that adds nothing."""
    times = new // old
    maps: dict[str, list[int | None]] = {
        "stack": [i % old for i in range(new)],
        "interleave": [i // times for i in range(new)],
        "identity": [None if i % times else i // times for i in range(new)],
    }
    return maps[how]


def relative_difference(one: LlamaForCausalLM, other: LlamaForCausalLM) -> float:
    """The largest difference of the logits of random tokens, over the largest logit."""
    length = one.config.max_position_embeddings
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(one.config.vocab_size, (4, length), generator=generator)
    with torch.no_grad():
        ours_BSV, theirs_BSV = one.eval()(ids_BS).logits, other.eval()(ids_BS).logits
    return ((ours_BSV - theirs_BSV).abs().max() / ours_BSV.abs().max()).item()


def _check(old: LlamaConfig, shape: Model) -> None:
    size = old.hidden_size // old.num_attention_heads
    if shape.hidden != shape.heads * size or not old.tie_word_embeddings:
        raise ValueError(f"{shape} needs heads of {size}, as the source's, and tied embeddings")
    if shape.layers % old.num_hidden_layers or shape.hidden < old.hidden_size:
        raise ValueError(f"{shape} is not {old.num_hidden_layers} layers, multiplied and widened")


def _grow_module(old: torch.nn.Module, new: torch.nn.Module) -> None:
    for name, weight in old.named_parameters():
        target = new.get_parameter(name)
        if "norm" in name:
            _grow_norm(weight, target)
        else:
            # Whole heads come first in the rows of q, k, v and the columns of o.
            _place(weight, target.zero_() if name.split(".")[-2] in WRITERS else target)


def _place(old: torch.Tensor, new: torch.Tensor) -> None:
    new[: old.shape[0], : old.shape[1]] = old


def _grow_norm(old: torch.Tensor, new: torch.Tensor) -> None:
    new.fill_(1.0)
    new[: old.shape[0]] = old
    new.mul_(math.sqrt(old.shape[0] / new.shape[0]))
