"""How long the teacher's passes of a step take, on the device that runs them."""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch


class Clock:
    """Adds up spans of work. On a GPU by events, which nothing waits for until they are read."""

    def __init__(self) -> None:
        self._spans: list[Callable[[], float]] = []

    @contextlib.contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Count what is done inside."""
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._spans.append(lambda: start.elapsed_time(end))
        else:
            began = time.perf_counter()
            yield
            milliseconds = 1e3 * (time.perf_counter() - began)
            self._spans.append(lambda: milliseconds)

    def read(self) -> float:
        """Return the milliseconds since the last reading; the device must have done its work."""
        spans, self._spans = self._spans, []
        return sum(span() for span in spans)
