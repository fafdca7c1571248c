"""Megatron's configuration of a model, from its arguments."""

from argparse import Namespace
from typing import Any

from megatron.training.argument_utils import gpt_config_from_args


def gpt_config(args: Namespace) -> Any:
    """Return Megatron's `GPTModelConfig`, with a flag that upstream loses on the way."""
    config = gpt_config_from_args(args)
    config.rope_scaling_factor = args.rope_scaling_factor
    return config
