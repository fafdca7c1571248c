"""Megatron's pipeline schedules, (interleaved) 1F1B, played through without communication.

With equal stages a step takes what the textbook says; with a teacher on one stage no simple formula
holds.
"""

from collections import deque
from functools import cache
from typing import NamedTuple

ROUNDS = 5
"""Rounds of `pp` micro-batches after which each further round takes as long as the last one."""


class Pass(NamedTuple):
    """A forward or a backward pass of one micro-batch through one chunk."""

    is_forward: bool
    chunk: int
    micro_batch: int


class Durations(NamedTuple):
    """Of one micro-batch's passes, in any unit: `[stage][chunk]`."""

    forward: tuple[tuple[float, ...], ...]
    backward: tuple[tuple[float, ...], ...]

    @property
    def stages(self) -> tuple[float, ...]:
        """Of each stage, all chunks, forward and backward."""
        both = zip(self.forward, self.backward, strict=True)
        return tuple(sum(forward) + sum(backward) for forward, backward in both)


@cache
def passes(stage: int, pp: int, vpp: int, micro_batches: int) -> tuple[Pass, ...]:
    """What a stage runs in a step, in order.

    As `forward_backward_pipelining_with(out)_interleaving`: `pp` micro-batches go through each
    chunk in turn; after the warm-up a forward and a backward pass alternate.
    """
    behind = pp - 1 - stage
    warm_up = behind if vpp == 1 else 2 * behind + (vpp - 1) * pp
    forward, backward = [], []
    for first in range(0, micro_batches, pp):
        group = range(first, min(first + pp, micro_batches))
        for chunk in range(vpp):
            forward += [Pass(True, chunk, index) for index in group]
            backward += [Pass(False, vpp - 1 - chunk, index) for index in group]
    warm_up = min(warm_up, len(forward))
    steady = [one for pair in zip(forward[warm_up:], backward, strict=False) for one in pair]
    return (*forward[:warm_up], *steady, *backward[len(forward) - warm_up :])


@cache
def most_waiting(
    stage: int, pp: int, vpp: int, micro_batches: int, chunk: int | None = None
) -> int:
    """Forward passes whose backward pass is still to come, at most; of one chunk, or of all."""
    waiting = most = 0
    for one in passes(stage, pp, vpp, min(micro_batches, ROUNDS * pp)):
        if chunk in (None, one.chunk):
            waiting += 1 if one.is_forward else -1
            most = max(most, waiting)
    return most


def step_duration(durations: Durations, micro_batches: int) -> float:
    """How long a step takes; many rounds are not played but follow from the last two."""
    pp = len(durations.forward)
    rounds, rest = divmod(micro_batches, pp)
    if rounds <= ROUNDS:
        return _played(durations, micro_batches)
    before, last = (_played(durations, n * pp + rest) for n in (ROUNDS - 1, ROUNDS))
    return last + (rounds - ROUNDS) * (last - before)


def _played(durations: Durations, micro_batches: int) -> float:
    """Each stage runs its passes in order, as soon as what they need is there."""
    pp, vpp = len(durations.forward), len(durations.forward[0])
    orders = [deque(passes(stage, pp, vpp, micro_batches)) for stage in range(pp)]
    clock = [0.0] * pp
    done: dict[tuple[int, Pass] | None, float] = {None: 0.0}
    while any(orders):
        for stage, order in enumerate(orders):
            while order and (needed := _needed(stage, order[0], pp, vpp)) in done:
                one = order.popleft()
                takes = durations.forward if one.is_forward else durations.backward
                start = max(clock[stage], done[needed])
                clock[stage] = done[stage, one] = start + takes[stage][one.chunk]
    return max(clock)


def _needed(stage: int, one: Pass, pp: int, vpp: int) -> tuple[int, Pass] | None:
    """The pass, and its stage, that must have ended; None for the first of a micro-batch."""
    if one.is_forward:
        if stage > 0:
            return stage - 1, one
        return (pp - 1, one._replace(chunk=one.chunk - 1)) if one.chunk > 0 else None
    if stage < pp - 1:
        return stage + 1, one
    if one.chunk < vpp - 1:
        return 0, one._replace(chunk=one.chunk + 1)
    return stage, one._replace(is_forward=True)
