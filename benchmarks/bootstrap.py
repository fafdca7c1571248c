"""Intervals of the figures that the benchmarks print."""

from collections.abc import Callable, Sequence

import numpy as np


def bounds(
    values: Sequence[float], statistic: Callable[..., np.ndarray] = np.median
) -> tuple[float, float]:
    """The 95 % bootstrap interval of a statistic, 10,000 resamples."""
    dice = np.random.default_rng(0)
    sample = dice.choice(np.asarray(values), size=(10_000, len(values)))
    low, high = np.percentile(statistic(sample, axis=1), [2.5, 97.5])
    return float(low), float(high)
