"""CUDA's streams and events on a machine that runs everything in order, for `cpu.py`."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any


class Stream:
    """A CUDA stream on a machine that runs everything in order: waiting is a no-op."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: "Stream") -> None:
        """All earlier work is already done."""

    def wait_event(self, event: "Event") -> None:
        """All earlier work is already done."""

    def record_event(self, event: "Event | None" = None) -> "Event":
        """Return an event that has already happened."""
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """All earlier work is already done."""

    def query(self) -> bool:
        """All earlier work is already done."""
        return True


class Event:
    """A CUDA event: the wall clock at the moment it was recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        """Note the time."""
        self._seconds = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        """All earlier work is already done."""

    def synchronize(self) -> None:
        """All earlier work is already done."""

    def query(self) -> bool:
        """All earlier work is already done."""
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds from this event to `end`."""
        return 1000 * (end._seconds - self._seconds)


@contextlib.contextmanager
def in_order(*args: Any, **kwargs: Any) -> Iterator[None]:
    """All work is in one stream."""
    yield
