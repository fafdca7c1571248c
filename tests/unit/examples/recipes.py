"""A recipe's flags, given to Megatron: in a worker, as if on as many GPUs."""

import os
import sys

from benchmarks.recipes import without
from megatron_let.training import command_line
from tests.support.testing import forget_last_run

ELSEWHERE = ("--tokenizer-", "--train-data-", "--valid-data-", "--data-cache-")
"""What names files or a hub that a test does not have."""


def without_files(flags: list[str]) -> list[str]:
    """Leave out flags that name data, and their values."""
    return without(flags, lambda flag: flag.startswith(ELSEWHERE))


def layers_of(recipes: dict[str, list[str]], gpus: int) -> dict[str, int]:
    """Parse and check each recipe's flags and build its configuration; returns its layers."""
    before = dict(os.environ)
    layers = {}
    for name, flags in recipes.items():
        forget_last_run()
        os.environ["WORLD_SIZE"] = str(gpus)
        mock = "--mock-data --tokenizer-type NullTokenizer --vocab-size 49151 --cpu".split()
        sys.argv = ["pretrain_let.py", *without_files(flags), *mock]
        try:
            config = command_line.gpt_config(command_line.parse_arguments())
        finally:
            os.environ.clear()
            os.environ.update(before)
        layers[name] = config.transformer.num_layers
    return layers
