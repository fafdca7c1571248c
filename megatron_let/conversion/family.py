"""One architecture that both Megatron and Hugging Face compute: a file says all of it.

Megatron's side is a mapping of attributes of its `args`, as `add_megatron_arguments` names them.
A family from outside the tree is added by `families.add_family` (docs/extending.md).
"""

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_let.conversion.mapping import KEEP, Form, ModelShape, Rule

Values = dict[str, Any]

QKV_NAME = "decoder.layers.self_attention.linear_qkv"
PROJECTION = "decoder.layers.self_attention.linear_proj"
FC1, FC2 = "decoder.layers.mlp.linear_fc1", "decoder.layers.mlp.linear_fc2"
EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm"


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


def with_bias(megatron: str, hugging_face: str, form: Form = KEEP) -> tuple[Rule, Rule]:
    """The rules of a matrix or a norm and its bias; `{}` takes "weight" and "bias"."""
    weight, bias = (
        Rule(megatron.format(kind), (hugging_face.format(kind, layer="{layer}"),), form)
        for kind in ("weight", "bias")
    )
    return weight, bias
