"""How long the teacher's passes of a step take, on the device that runs them."""

import contextlib
from collections.abc import Iterator

import torch


class Clock:
    """Adds up spans of work by events, which nothing waits for until they are read."""

    def __init__(self) -> None:
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count what is done inside."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._spans.append((start, end))

    def read(self) -> float:
        """Return the milliseconds since the last reading; the device must have done its work."""
        spans, self._spans = self._spans, []
        return sum(start.elapsed_time(end) for start, end in spans)
