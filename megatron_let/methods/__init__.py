"""The table of methods: the only place that knows their names."""

from argparse import Namespace

from megatron_let.methods.base import Method
from megatron_let.methods.distill import Distill
from megatron_let.methods.let import Let

METHODS: dict[str, type[Method]] = {
    "baseline": Method,
    "let": Let,
    "salt": Distill,
    "reverse-kd": Distill,
}


def build_method(args: Namespace) -> Method:
    """Return the method that `--method` names, after its own checks of `args`."""
    return METHODS[args.method](args)
