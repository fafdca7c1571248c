"""The families that are converted; each file here says all of some."""

from megatron_let.conversion.families import gpt, llama
from megatron_let.conversion.family import Family
from megatron_let.errors import UsageError

FAMILIES = [llama.LLAMA, llama.QWEN2, llama.QWEN3, gpt.GPT2, gpt.GPT_NEOX]


def add_family(family: Family) -> None:
    """Convert one more architecture; a UsageError if its `model_type` is known already."""
    if family.model_type in (known.model_type for known in FAMILIES):
        raise UsageError(f"There is a family for model_type {family.model_type} already.")
    FAMILIES.append(family)
