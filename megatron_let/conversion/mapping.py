"""From Megatron's tensors to Hugging Face's: a table of names and two tensors to take apart.

Shapes: L layers, V vocabulary rows, h hidden size, f MLP width, n query heads, g query groups,
d size of a head. Megatron stacks what the layers have in common to one `[L, ...]` tensor.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from megatron_let.errors import UsageError


@dataclass(frozen=True)
class ModelShape:
    """The sizes that a tensor alone does not tell."""

    num_layers: int
    num_heads: int
    num_query_groups: int
    """Key and value heads; `num_heads` without grouped-query attention."""
    head_dim: int
    vocab_size: int
    """Rows of the embedding that have a token; Megatron pads to more."""


Split = Callable[[torch.Tensor, ModelShape], tuple[torch.Tensor, ...]]


# --- what a tensor is taken apart into --------------------------------------------------------


def keep(weight: torch.Tensor, shape: ModelShape) -> tuple[torch.Tensor, ...]:
    """Return the tensor as it is."""
    return (weight,)


def cut_vocabulary(weight_Vh: torch.Tensor, shape: ModelShape) -> tuple[torch.Tensor, ...]:
    """Return the rows `[vocab_size, h]` that have a token.

    Megatron's softmax counts the rows that only pad, so a barely trained model's loss is lower
    without them. Training pushes their logits down.

    Raises:
        UsageError: the table has fewer rows than the tokenizer has tokens.
    """
    if shape.vocab_size > weight_Vh.shape[0]:
        raise UsageError(
            f"The tokenizer has {shape.vocab_size} tokens and the model {weight_Vh.shape[0]} "
            "rows: it is not the tokenizer of this run. Give that one with --tokenizer-model."
        )
    return (weight_Vh[: shape.vocab_size],)


def split_qkv(weight: torch.Tensor, shape: ModelShape) -> tuple[torch.Tensor, ...]:
    """Take apart `linear_qkv` `[(n + 2g) d, h]`: query `[n d, h]`, key and value `[g d, h]`.

    A group's rows stand together, its n/g query heads first, then its key, then its value
    (`get_query_key_value_tensors` of Megatron's `SelfAttention`). Hugging Face keeps each kind
    in one matrix, and head i reads group i // (n/g) as well.

    Raises:
        UsageError: the rows do not fit the run's numbers of heads.
    """
    groups, head_dim = shape.num_query_groups, shape.head_dim
    per_group = shape.num_heads // groups
    num_rows = groups * (per_group + 2) * head_dim
    if weight.shape[0] != num_rows:
        raise UsageError(
            f"linear_qkv has {weight.shape[0]} rows; {shape.num_heads} heads of {head_dim} in "
            f"{groups} groups make {num_rows}."
        )
    grouped = weight.view(groups, per_group + 2, head_dim, -1)
    parts = grouped.split([per_group, 1, 1], dim=1)
    return tuple(part.reshape(-1, weight.shape[1]) for part in parts)


def split_gated_mlp(weight: torch.Tensor, shape: ModelShape) -> tuple[torch.Tensor, ...]:
    """Take apart `linear_fc1` `[2f, h]`: the half under the activation, then the linear half."""
    return weight.chunk(2, dim=0)


# --- the table ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """One tensor of Megatron's and what it becomes; `{layer}` marks a stacked one."""

    megatron: str
    hugging_face: tuple[str, ...]
    split: Split = keep

    @property
    def stacked(self) -> bool:
        """Whether Megatron stacks this tensor over the layers."""
        return "{layer}" in self.hugging_face[0]


LAYER = "model.layers.{layer}"
OUTPUT_LAYER = Rule("output_layer.weight", ("lm_head.weight",), cut_vocabulary)
LLAMA = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), cut_vocabulary),
    Rule(
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        (f"{LAYER}.input_layernorm.weight",),
    ),
    Rule(
        "decoder.layers.self_attention.linear_qkv.weight",
        tuple(f"{LAYER}.self_attn.{letter}_proj.weight" for letter in "qkv"),
        split_qkv,
    ),
    Rule("decoder.layers.self_attention.linear_proj.weight", (f"{LAYER}.self_attn.o_proj.weight",)),
    Rule(
        "decoder.layers.mlp.linear_fc1.layer_norm_weight",
        (f"{LAYER}.post_attention_layernorm.weight",),
    ),
    Rule(
        "decoder.layers.mlp.linear_fc1.weight",
        (f"{LAYER}.mlp.gate_proj.weight", f"{LAYER}.mlp.up_proj.weight"),
        split_gated_mlp,
    ),
    Rule("decoder.layers.mlp.linear_fc2.weight", (f"{LAYER}.mlp.down_proj.weight",)),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
    OUTPUT_LAYER,
)

NOT_WEIGHTS = {
    r"(^|\.)_extra_state(/|$)": "Transformer Engine's scaling state",
    r"(^|\.)let_resize\.": "LET's learned map, which only training uses",
    r"^optimizer\.": "the optimizer",
    r"^rng_state(/|$)": "random number generators",
    r"^rerun_state_machine_state(/|$)": "Megatron's check for faulty devices",
    r"^common_state(/|$)": "arguments, counters and the scheduler",
}
"""What a checkpoint holds beside the weights: a pattern of the name, and what it is."""


def rules_for(names: Iterable[str], *, tied: bool) -> tuple[Rule, ...]:
    """Return the rules that turn the tensors of a checkpoint into a Llama, in the table's order.

    Args:
        names: everything the checkpoint holds.
        tied: the output layer is the embedding, so the checkpoint has no `output_layer.weight`.

    Raises:
        UsageError: a tensor of the table is missing, or one is left that is no weight of a Llama.
    """
    rules = tuple(rule for rule in LLAMA if not (tied and rule is OUTPUT_LAYER))
    weights = {name for name in names if not is_not_weight(name)}
    expected = {rule.megatron for rule in rules}
    for what, differing in (
        ("lacks", expected - weights),
        ("holds, beside the weights of a Llama,", weights - expected),
    ):
        if differing:
            raise UsageError(
                f"Not exported: the checkpoint {what} {', '.join(sorted(differing)[:5])}"
                f"{' and others' if len(differing) > 5 else ''}."
            )
    return rules


def is_not_weight(name: str) -> bool:
    """Whether a checkpoint's entry is something that `NOT_WEIGHTS` lists."""
    return any(re.search(pattern, name) for pattern in NOT_WEIGHTS)


def convert(
    rule: Rule, tensor: torch.Tensor, shape: ModelShape
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield Hugging Face's names and tensors (views where possible) for one of Megatron's.

    Raises:
        UsageError: the tensor does not have the shape that the run's arguments tell.
    """
    if rule.stacked and tensor.shape[0] != shape.num_layers:
        raise UsageError(
            f"{rule.megatron} stacks {tensor.shape[0]} layers; the run had {shape.num_layers}."
        )
    for layer, weight in enumerate(tensor.unbind(0) if rule.stacked else (tensor,)):
        parts = rule.split(weight, shape)
        for template, part in zip(rule.hugging_face, parts, strict=True):
            yield template.format(layer=layer), part
