"""How much the teacher counts at a given step: step -> factor in [0, 1]; and how long a run is."""

import math
from argparse import Namespace
from collections.abc import Callable
from typing import Any

DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "step": lambda progress: 1.0,
}
"""Factor as a function of progress = done / stop, for progress < 1; from 1 on it is zero.

`linear` is the paper's `max(0, (S_stop - s) / S_stop)`; `step` stays at one until the stop.
"""


def guidance_factor(done: int, stop: int | None, decay: str) -> float:
    """Factor of the initial weight in the step after `done` steps.

    It is zero from `stop` on, or never without one; `decay` is a key of `DECAYS`.
    """
    if stop is None:
        return 1.0
    return DECAYS[decay](done / stop) if done < stop else 0.0


def schedule_samples(args: Namespace) -> list[Any]:
    """The samples of the whole run, of the decay and of the warm-up, as Megatron counts them."""
    batch = args.global_batch_size or 1
    total = args.train_samples or (args.train_iters or 0) * batch
    decay = args.lr_decay_samples or (args.lr_decay_iters or 0) * batch or total
    warmup = args.lr_warmup_samples or (args.lr_warmup_iters or 0) * batch
    return [total, decay, args.lr_warmup_fraction and args.lr_warmup_fraction * decay or warmup]


def run_length(args: Namespace) -> int | None:
    """The steps of the whole run; None as long as the flags do not tell."""
    is_unknown = args.global_batch_size is None or args.step_batch_size_schedule is not None
    if args.train_iters is not None or args.train_samples is None or is_unknown:
        return args.train_iters
    return args.train_samples // args.global_batch_size
