"""CUDA's streams and events on a machine that runs everything in order, for `cpu.py`.

What they take and tell beyond torch's own for the CPU, whose waiting is a no-op, too.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class Event(torch.cpu.Event):
    """The wall clock at the moment it was recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: Any = None) -> None:
        """Note the time."""
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds from this event to `end`."""
        return 1000 * (end._seconds - self._seconds)


class Stream(torch.cpu.Stream):
    """The one stream; all earlier work is already done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Neither device nor priority matters."""

    def record_event(self, event: Event | None = None) -> Event:  # type: ignore[override]
        """Return an event that has already happened."""
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """All earlier work is already done."""

    def query(self) -> bool:
        """All earlier work is already done."""
        return True


@contextlib.contextmanager
def in_order(*args: Any, **kwargs: Any) -> Iterator[None]:
    """All work is in one stream."""
    yield
