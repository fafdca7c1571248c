"""Which tensors a family's rules read, and that they are what is there."""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch

from megatron_let.conversion.family import OUTPUT_LAYER, ModelShape, Rule
from megatron_let.errors import UsageError

NOT_WEIGHTS = {
    r"(^|\.)_extra_state(/|$)": "Transformer Engine's scaling state",
    r"(^|\.)let_resize\.": "LET's learned map, which only training uses",
    r"^(chained_\d+\.)?optimizer\.": "the optimizer, or one of several",
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


def pieces(rules: Sequence[Rule], shape: ModelShape) -> list[tuple[Rule, int | None]]:
    """Return what the whole model has once, with None, then what each layer has."""
    stacked = [rule for rule in rules if rule.stacked]
    once = [(rule, None) for rule in rules if not rule.stacked]
    return [*once, *((rule, layer) for layer in range(shape.num_layers) for rule in stacked)]


def check_shapes(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], made: str
) -> None:
    """Refuse tensors of other shapes than `expected`, which somebody `made` so."""
    for name, tensor in tensors.items():
        if name in expected and tensor.shape != expected[name].shape:
            raise UsageError(
                f"{name} has the shape {tuple(tensor.shape)}; {made} it "
                f"{tuple(expected[name].shape)}."
            )


def check_finite(what: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as it is; a UsageError if a value is NaN or infinite."""
    low, high = tensor.aminmax()
    if not (low.isfinite() and high.isfinite()):
        raise UsageError(
            f"{what} has values from {low} to {high}: it is damaged, of a run that diverged, or "
            f"too large for {tensor.dtype}. Download the model again, or choose an earlier "
            "checkpoint, or another --dtype."
        )
    return tensor


def check_names(
    expected: Iterable[str], found: Iterable[str], what: str, ignored: dict[str, str]
) -> None:
    """Refuse weights that are missing, or that no rule reads.

    `found` is everything there is in `what`, and `ignored` has the patterns of what is no weight.
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
