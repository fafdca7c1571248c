"""The words of which a family is made: rules of names, six forms of tensors, `Family`.

A family is one architecture that both Megatron and Hugging Face compute, and its literal says all
of it. Megatron's side of a configuration is a mapping of attributes of its `args`, as
`add_megatron_arguments` names them.

Shapes: L layers, V vocabulary rows, h hidden size, f MLP width, n query heads, g query groups,
d size of a head. Megatron stacks what the layers have in common to one `[L, ...]` tensor.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_let.errors import UsageError

Values = dict[str, Any]
Parts = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class ModelShape:
    """The sizes that a tensor alone does not tell."""

    num_layers: int
    num_heads: int
    num_query_groups: int
    """Key and value heads; `num_heads` without grouped-query attention."""
    head_dim: int
    vocab_size: int
    """Rows of the embedding that Hugging Face gets; Megatron pads to more."""


@dataclass(frozen=True)
class Form:
    """How a tensor of Megatron's is taken apart into Hugging Face's, and put together again."""

    split: Callable[[torch.Tensor, ModelShape], Parts]
    join: Callable[[Parts, ModelShape], torch.Tensor]


def cut_vocabulary(weight_Vh: torch.Tensor, shape: ModelShape) -> Parts:
    """Return the rows `[vocab_size, h]` that have a token.

    Megatron's softmax counts the rows that only pad, so a barely trained model's loss is lower
    without them. Training pushes their logits down.
    """
    if shape.vocab_size > weight_Vh.shape[0]:
        raise UsageError(
            f"The tokenizer has {shape.vocab_size} tokens and the model {weight_Vh.shape[0]} "
            "rows: it is not the tokenizer of this run. Give that one with --tokenizer-model."
        )
    return (weight_Vh[: shape.vocab_size],)


def split_qkv(weight: torch.Tensor, shape: ModelShape) -> Parts:
    """Take apart `linear_qkv` `[(n + 2g) d, h]`: query `[n d, h]`, key and value `[g d, h]`.

    A group's rows stand together, its n/g query heads first, then its key, then its value
    (`get_query_key_value_tensors` of Megatron's `SelfAttention`). Hugging Face keeps each kind
    in one matrix, and head i reads group i // (n/g) as well. A bias is taken apart likewise.
    """
    groups, head_dim = shape.num_query_groups, shape.head_dim
    per_group = shape.num_heads // groups
    num_rows = groups * (per_group + 2) * head_dim
    if weight.shape[0] != num_rows:
        raise UsageError(
            f"linear_qkv has {weight.shape[0]} rows; {shape.num_heads} heads of {head_dim} in "
            f"{groups} groups make {num_rows}."
        )
    columns = weight.shape[1:]
    grouped = weight.view(groups, per_group + 2, head_dim, *columns)
    parts = grouped.split([per_group, 1, 1], dim=1)
    return tuple(part.reshape(-1, *columns) for part in parts)


def join_qkv(parts: Parts, shape: ModelShape) -> torch.Tensor:
    """Undo `split_qkv`."""
    columns = parts[0].shape[1:]
    grouped = [part.view(shape.num_query_groups, -1, shape.head_dim, *columns) for part in parts]
    return torch.cat(grouped, dim=1).reshape(-1, *columns)


KEEP = Form(lambda weight, shape: (weight,), lambda parts, shape: parts[0])
VOCABULARY = Form(cut_vocabulary, KEEP.join)  # Megatron pads a table that it loads
QKV = Form(split_qkv, join_qkv)
# `linear_fc1` `[2f, h]`: the half under the activation, then the linear half.
GATED_MLP = Form(lambda weight, shape: weight.chunk(2), lambda parts, shape: torch.cat(parts))
# GPT-2's `Conv1D` keeps `[in, out]`; a bias stays what it is.
TRANSPOSED = Form(lambda weight, shape: (weight.t(),), lambda parts, shape: parts[0].t())
# Its `c_attn` `[h, 3h]`: query, key and value side by side.
QKV_COLUMNS = Form(
    lambda weight, shape: (torch.cat(split_qkv(weight, shape)).t(),),
    lambda parts, shape: join_qkv(parts[0].t().chunk(3), shape),
)

QKV_NAME = "decoder.layers.self_attention.linear_qkv"
PROJECTION = "decoder.layers.self_attention.linear_proj"
FC1, FC2 = "decoder.layers.mlp.linear_fc1", "decoder.layers.mlp.linear_fc2"
EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm"
OUTPUT_LAYER = "output_layer.weight"
"""Absent where the output layer is the embedding."""


@dataclass(frozen=True)
class Rule:
    """One tensor of Megatron's and what it becomes; `{layer}` marks a stacked one."""

    megatron: str
    hugging_face: tuple[str, ...]
    form: Form = KEEP

    @property
    def stacked(self) -> bool:
        """Whether Megatron stacks this tensor over the layers."""
        return "{layer}" in self.hugging_face[0]

    def names(self, layer: int | None) -> list[str]:
        """Hugging Face's names of the parts."""
        return [template.format(layer=layer) for template in self.hugging_face]

    def split(
        self, weight: torch.Tensor, layer: int | None, shape: ModelShape
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield Hugging Face's names and tensors (views where possible) for one of Megatron's."""
        return zip(self.names(layer), self.form.split(weight, shape), strict=True)

    def join(
        self, read: Callable[[str], torch.Tensor], layer: int | None, shape: ModelShape
    ) -> torch.Tensor:
        """Return Megatron's tensor, of the parts that `read` gives by Hugging Face's names."""
        return self.form.join(tuple(map(read, self.names(layer))), shape)


def with_bias(megatron: str, hugging_face: str, form: Form = KEEP) -> tuple[Rule, ...]:
    """The rules of a matrix or a norm and its bias; `{}` takes "weight" and "bias"."""
    return tuple(
        Rule(megatron.format(kind), (hugging_face.format(kind, layer="{layer}"),), form)
        for kind in ("weight", "bias")
    )


@dataclass(frozen=True)
class Family:
    """One architecture."""

    name: str
    model_type: str
    """transformers' name."""
    rules: tuple[Rule, ...]
    needs: Mapping[str, Any]
    """Arguments of Megatron's that must have one value to compute the same."""
    demands: Mapping[str, tuple[Any, ...]]
    """Fields of the Hugging Face config, and the values that Megatron can compute."""
    same: Mapping[str, str]
    """Arguments of Megatron's, and the fields of the Hugging Face config with the same value."""
    to_config: Callable[[Namespace, ModelShape], Values]
    """Its other fields."""
    from_config: Callable[[Any], Values]
    """The other arguments."""
