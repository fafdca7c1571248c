"""How much the teacher counts at a given step: step -> factor in [0, 1], and nothing else."""

import math
from argparse import Namespace
from collections.abc import Callable

DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "step": lambda progress: 1.0,
}
"""Factor as a function of progress = done / stop, for progress < 1; from 1 on it is zero.

`linear` is the paper's `max(0, (S_stop - s) / S_stop)`; `step` stays at one until the stop.
"""


def guidance_factor(done: int, stop: int | None, decay: str) -> float:
    """Factor of the initial weight after `done` of `stop` steps (or samples).

    Args:
        done: steps (or samples) completed before this one, 0 at the first.
        stop: step (or sample) from which on the factor is zero; None for one during the whole run.
        decay: a key of `DECAYS`; any without a stop.
    """
    if stop is None:
        return 1.0
    return DECAYS[decay](done / stop) if done < stop else 0.0


def run_length(args: Namespace, unit: str) -> int | None:
    """The whole run in `step` or `samples`; None as long as the flags do not tell."""
    given = {"step": args.train_iters, "samples": args.train_samples}
    if given[unit] is not None:
        return given[unit]
    if args.global_batch_size is None or args.step_batch_size_schedule is not None:
        return None
    if unit == "step":
        return args.train_samples and args.train_samples // args.global_batch_size
    return args.train_iters and args.train_iters * args.global_batch_size
