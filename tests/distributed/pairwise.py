"""Pairwise test design: few cases in which every pair of values of two dimensions meets."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence

Case = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]


def pairs_of(case: Mapping[str, str]) -> set[Pair]:
    """All pairs of (dimension, value) in a case, in the dimensions' order."""
    return set(itertools.combinations(case.items(), 2))


def pairwise(
    dimensions: Mapping[str, Sequence[str]], allowed: Callable[[Case], bool], tries: int = 60
) -> list[Case]:
    """Return cases that hold every pair which some allowed case can hold.

    Greedy: each case starts from a pair that is still missing and takes the best of some random
    completions. The same cases on every machine.

    Args:
        dimensions: the values of each dimension.
        allowed: whether a case, complete or begun, is possible; if a begun one is not, no
            completion of it may be.
        tries: completions to choose each case from.
    """
    dice = random.Random(0)
    missing = sorted(
        pair
        for a, b in itertools.combinations(dimensions, 2)
        for x, y in itertools.product(dimensions[a], dimensions[b])
        if allowed(dict(pair := ((a, x), (b, y))))
    )
    cases: list[Case] = []
    while missing:
        found = [_complete(dict(missing[0]), dimensions, allowed, dice) for _ in range(tries)]
        usable = [case for case in found if case is not None]
        if not usable:  # nothing can hold this pair
            missing.pop(0)
            continue
        best = max(usable, key=lambda case: len(pairs_of(case) & set(missing)))
        cases.append(best)
        missing = [pair for pair in missing if pair not in pairs_of(best)]
    return cases


def _complete(
    begun: Case,
    dimensions: Mapping[str, Sequence[str]],
    allowed: Callable[[Case], bool],
    dice: random.Random,
) -> Case | None:
    case = dict(begun)
    for dimension in dice.sample(list(dimensions), len(dimensions)):
        if dimension in case:
            continue
        values = [v for v in dimensions[dimension] if allowed(case | {dimension: v})]
        if not values:
            return None
        case[dimension] = dice.choice(values)
    return {dimension: case[dimension] for dimension in dimensions}
