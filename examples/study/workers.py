"""Several runs at a time, as far as the results they wait for are there."""

import threading
import time
from collections.abc import Sequence

from examples.study.study import Study


class Workers:
    """Threads that make the open runs, several at a time, in the table's order as far as they can.

    Args:
        study: whose runs.
        only: names of runs; None: all.
        minutes: how long; None: until all are done.
    """

    def __init__(self, study: Study, only: Sequence[str] | None, minutes: float | None) -> None:
        self._study = study
        self._names = study.names if only is None else tuple(only)
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._changed = threading.Condition()
        self._taken: set[str] = set()
        self._running = 0
        self._failures: list[str] = []

    def run(self, jobs: int) -> None:
        """Work until nothing can be done any more. Exits with the reasons of runs that failed."""
        threads = [threading.Thread(target=self._work) for _ in range(jobs)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:  # the runs have heard it too: begin no others
            self._end = time.monotonic()
            raise
        if self._failures:
            raise SystemExit("\n".join(self._failures))

    def _work(self) -> None:
        while (name := self._take()) is not None:
            print(f"{name}: begins", flush=True)
            try:
                self._study.perform(name, self._minutes_left())
            except (Exception, SystemExit) as error:  # the others go on
                self._failures.append(f"{name}: {error}")
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _take(self) -> str | None:
        """The first run that can be made now; waits for one; None if there will be none."""
        with self._changed:
            while self._has_time() and (left := self._open()):
                name = next((name for name in left if self._study.is_ready(name)), None)
                if name is not None:
                    self._taken.add(name)
                    self._running += 1
                    return name
                if not self._running:
                    return None
                self._changed.wait()
            return None

    def _open(self) -> list[str]:
        untouched = (name for name in self._names if name not in self._taken)
        return [name for name in untouched if not self._study.is_done(name)]

    def _minutes_left(self) -> float | None:
        return None if self._end is None else (self._end - time.monotonic()) / 60

    def _has_time(self) -> bool:
        left = self._minutes_left()
        return left is None or left >= 1
