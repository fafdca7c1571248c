"""The table of methods: the only place that knows their names."""

from argparse import Namespace

from megatron_let.methods.base import Method
from megatron_let.methods.distill import Distill
from megatron_let.methods.guided import TeacherMethod
from megatron_let.methods.let import Let
from megatron_let.methods.signal import Signal

METHODS: dict[str, tuple[type[Signal], ...]] = {
    "baseline": (),
    "let": (Let,),
    "salt": (Distill,),
    "reverse-kd": (Distill,),
    "let+salt": (Let, Distill),
}
"""By name the signals of a teacher that the method has; without one it is plain training."""


def build_method(args: Namespace) -> Method:
    """Return the method that `--method` names, after its own checks of `args`."""
    signals = METHODS[args.method]
    return TeacherMethod(args, signals) if signals else Method(args)
