"""Work spread over processes comes back in order and never runs ahead of who takes it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_let.data.workers import map_in_order

ROOT = Path(__file__).resolve().parents[3]
ORPHAN_MAKER = """
import os, signal
from megatron_let.data.workers import map_in_order
for number in map_in_order(abs, range(1000), 2):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def slow_square(number: int) -> int:
    time.sleep(0.02 if number % 5 == 0 else 0)
    return number**2


def fail_at_three(number: int) -> int:
    if number == 3:
        raise ValueError("three")
    return number


def die(number: int) -> None:
    os._exit(9)


def test_results_keep_the_order() -> None:
    assert list(map_in_order(slow_square, range(40), workers=2)) == [n**2 for n in range(40)]


def test_items_are_taken_only_as_results_are() -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    results = map_in_order(slow_square, items(), workers=2)
    next(results)
    assert len(taken) == 10
    results.close()


def doubled(arrays: list[np.ndarray]) -> list[np.ndarray]:
    return [2 * array for array in arrays]


def test_arrays_come_back_whole() -> None:
    """More of them than places, of all sizes, and too large ones among them."""
    sizes = [0, 1, 63, 65, 300_000, 1_100_000, 5_000_000]
    items = [[np.arange(size, dtype=np.uint16)] * (size % 3) for size in sizes * 8]
    for item, result in zip(items, map_in_order(doubled, iter(items), workers=2), strict=True):
        assert len(result) == len(item)
        assert all(np.array_equal(r, 2 * i) for r, i in zip(result, item, strict=True))


def test_exception_is_raised_in_the_caller() -> None:
    results = map_in_order(fail_at_three, range(100), workers=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)


def test_killed_worker_is_reported() -> None:
    with pytest.raises(ValueError, match="a worker was killed"):
        list(map_in_order(die, range(10), workers=2))


def test_workers_end_with_a_killed_parent() -> None:
    # The output is at its end only when no worker holds it any more; otherwise this times out.
    command = [sys.executable, "-c", ORPHAN_MAKER]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert result.returncode == -signal.SIGKILL, result.stderr
