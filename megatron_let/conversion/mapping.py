"""From Megatron's tensors to Hugging Face's and back: rules of names, and six forms of tensors.

Shapes: L layers, V vocabulary rows, h hidden size, f MLP width, n query heads, g query groups,
d size of a head. Megatron stacks what the layers have in common to one `[L, ...]` tensor.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from megatron_let.errors import UsageError

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


# --- the forms ---------------------------------------------------------------------------------


def cut_vocabulary(weight_Vh: torch.Tensor, shape: ModelShape) -> Parts:
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


def split_qkv(weight: torch.Tensor, shape: ModelShape) -> Parts:
    """Take apart `linear_qkv` `[(n + 2g) d, h]`: query `[n d, h]`, key and value `[g d, h]`.

    A group's rows stand together, its n/g query heads first, then its key, then its value
    (`get_query_key_value_tensors` of Megatron's `SelfAttention`). Hugging Face keeps each kind
    in one matrix, and head i reads group i // (n/g) as well. A bias is taken apart in the same
    way.

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
    columns = weight.shape[1:]
    grouped = weight.view(groups, per_group + 2, head_dim, *columns)
    parts = grouped.split([per_group, 1, 1], dim=1)
    return tuple(part.reshape(-1, *columns) for part in parts)


def join_qkv(parts: Parts, shape: ModelShape) -> torch.Tensor:
    """Undo `split_qkv`."""
    columns = parts[0].shape[1:]
    grouped = [part.view(shape.num_query_groups, -1, shape.head_dim, *columns) for part in parts]
    return torch.cat(grouped, dim=1).reshape(-1, *columns)


def split_qkv_to_columns(weight: torch.Tensor, shape: ModelShape) -> Parts:
    """GPT-2's `c_attn` `[h, 3h]`: query, key and value side by side."""
    return (torch.cat(split_qkv(weight, shape)).t(),)


def join_qkv_columns(parts: Parts, shape: ModelShape) -> torch.Tensor:
    """Undo `split_qkv_to_columns`."""
    return join_qkv(parts[0].t().chunk(3), shape)


KEEP = Form(lambda weight, shape: (weight,), lambda parts, shape: parts[0])
VOCABULARY = Form(cut_vocabulary, KEEP.join)  # Megatron pads a table that it loads
QKV = Form(split_qkv, join_qkv)
# `linear_fc1` `[2f, h]`: the half under the activation, then the linear half.
GATED_MLP = Form(lambda weight, shape: weight.chunk(2), lambda parts, shape: torch.cat(parts))
# GPT-2's `Conv1D` keeps `[in, out]`; a bias stays what it is.
TRANSPOSED = Form(lambda weight, shape: (weight.t(),), lambda parts, shape: parts[0].t())
QKV_COLUMNS = Form(split_qkv_to_columns, join_qkv_columns)


# --- rules -------------------------------------------------------------------------------------


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


OUTPUT_LAYER = "output_layer.weight"
"""Absent where the output layer is the embedding."""

NOT_WEIGHTS = {
    r"(^|\.)_extra_state(/|$)": "Transformer Engine's scaling state",
    r"(^|\.)let_resize\.": "LET's learned map, which only training uses",
    r"^optimizer\.": "the optimizer",
    r"^rng_state(/|$)": "random number generators",
    r"^rerun_state_machine_state(/|$)": "Megatron's check for faulty devices",
    r"^common_state(/|$)": "arguments, counters and the scheduler",
}
"""What a checkpoint holds beside the weights: a pattern of the name, and what it is."""

NOT_HUGGING_FACE_WEIGHTS = {
    r"\.rotary_emb\.inv_freq$": "rotary frequencies, which the configuration tells",
    r"\.(attn|attention)\.(bias|masked_bias)$": "the causal mask, saved by older versions",
}
"""The same for a folder of Hugging Face's."""


def rules_of(rules: Iterable[Rule], *, tied: bool) -> tuple[Rule, ...]:
    """Return a family's rules, without the output layer if it is the embedding."""
    return tuple(rule for rule in rules if not (tied and rule.megatron == OUTPUT_LAYER))


def pieces(rules: Iterable[Rule], shape: ModelShape) -> list[tuple[Rule, int | None]]:
    """Return what the whole model has once, with None, then what each layer has."""
    rules = list(rules)
    layers = range(shape.num_layers)
    once = [(rule, None) for rule in rules if not rule.stacked]
    return [*once, *((rule, layer) for layer in layers for rule in rules if rule.stacked)]


def check_shapes(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], made: str
) -> None:
    """Refuse tensors of other shapes than `expected`, which somebody `made` so.

    Raises:
        UsageError: naming the first.
    """
    for name, tensor in tensors.items():
        if name in expected and tensor.shape != expected[name].shape:
            raise UsageError(
                f"{name} has the shape {tuple(tensor.shape)}; {made} it "
                f"{tuple(expected[name].shape)}."
            )


def check_names(
    expected: Iterable[str], found: Iterable[str], what: str, ignored: dict[str, str]
) -> None:
    """Refuse weights that are missing, or that nobody would read.

    Args:
        expected: the names that the rules read.
        found: everything there is.
        what: where it was found, for the message.
        ignored: patterns of what is no weight.

    Raises:
        UsageError: naming what is missing or left.
    """
    wanted = set(expected)
    weights = {name for name in found if not is_not_weight(name, ignored)}
    for verb, names in (
        ("lacks", wanted - weights),
        ("holds, beside the weights of that,", weights - wanted),
    ):
        if names:
            raise UsageError(
                f"Not converted: {what} {verb} {', '.join(sorted(names)[:5])}"
                f"{' and others' if len(names) > 5 else ''}."
            )


def is_not_weight(name: str, ignored: dict[str, str]) -> bool:
    """Whether an entry is something that the list `ignored` names."""
    return any(re.search(pattern, name) for pattern in ignored)
