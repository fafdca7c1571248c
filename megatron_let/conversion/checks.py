"""Which tensors a family's rules read, and that they are what is there."""

import re
from collections.abc import Iterable, Mapping

import torch

from megatron_let.conversion.family import OUTPUT_LAYER, ModelShape, Rule
from megatron_let.errors import UsageError

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
