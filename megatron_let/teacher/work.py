"""How a teacher works: rows dealt over tensor-parallel ranks, cut into windows; logits in parts."""

from math import ceil, gcd

CHUNK, PARTS = 512, 8
SCORED_EVERY = 10
"""Steps from one to the next in which the teacher's own loss is taken, where that is extra work."""


def micro_batches_at_once(rows_per_micro_batch: int, ranks: int) -> int:
    """The fewest micro-batches whose rows can be dealt evenly over the ranks."""
    return ranks // gcd(ranks, rows_per_micro_batch)


def share_per_rank(rows_per_micro_batch: int, micro_batches: int, ranks: int) -> float:
    """The part of a step's rows that each rank runs the teacher on.

    `1 / ranks`, but for the last micro-batches of a step where they are too few to deal evenly.
    """
    at_once = micro_batches_at_once(rows_per_micro_batch, ranks)
    groups, rest = divmod(micro_batches, at_once)
    rows = groups * (at_once * rows_per_micro_batch // ranks)
    rows += ceil(rest * rows_per_micro_batch / ranks)
    return rows / (micro_batches * rows_per_micro_batch)


def window_ends(length: int, context: int) -> list[int]:
    """Where each of the windows ends in which a row is read; each holds `context` tokens.

    A row that is not longer is read at once. Each later window is moved on by half a context, so
    that its new tokens are read behind at least as much text, the last one up to the row's end.
    """
    return [*range(context, length, max(1, context // 2)), length]


def logits_at_once(tokens: int) -> int:
    """How many of a micro-batch's tokens have their teacher logits at once."""
    return min(CHUNK, ceil(tokens / PARTS))
