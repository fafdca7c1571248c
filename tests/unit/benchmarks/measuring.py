"""Run in a worker: importing `run_measured` brings Megatron's CPU platform."""

import warnings
from collections import Counter

import torch

SYNC = "called a synchronizing CUDA operation (Triggered internally at ...)"
"""What torch says in its debug mode, when the host waits for the device."""


def wait() -> None:
    warnings.warn(SYNC, stacklevel=1)


def waits_by_place() -> dict[str, int]:
    """Two waits that torch warns of, one explicit one, another warning, and one wait too late."""
    from benchmarks.run_measured import host_waits

    found: Counter[str] = Counter()
    with host_waits(found):
        for _ in range(2):
            wait()
        torch.cuda.synchronize()
        warnings.warn("of no interest", stacklevel=1)
    torch.cuda.synchronize()
    return dict(found)


def turns(modes: list[str], cycles: int) -> tuple[list[str], dict[str, int]]:
    """The modes of the steps of a run, and how many of each were measured."""
    from benchmarks.run_measured import Steps

    steps = Steps(modes, cycles)
    order = []
    for _ in range(steps.number):
        steps.begin()
        order.append(steps.mode)
    steps.end()
    return order, {mode: len(times) for mode, times in steps.milliseconds.items()}
