"""The console shows the program's own lines; what libraries print goes to a log.

`say` is how the program speaks. Each rank that prints anything keeps a log of all of it in the
run's folder; without one it is lost, and `--verbose-console` shows everything instead.
"""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

LOUD = {"--verbose-console", "-h", "--help"}
"""With one of these everything is shown."""
FOLDER = "console"
EARLY_LINES = 10_000
"""So many are kept until it is known where the log is."""


class Console(io.TextIOBase):
    """In the place of `sys.stdout`: what is written goes to the log alone."""

    def __init__(self, terminal: TextIO) -> None:
        self.terminal = terminal
        self._early: deque[str] = deque(maxlen=EARLY_LINES)
        self._log: TextIO | None = None

    def write(self, text: str) -> int:
        """Note it."""
        if self._log is None:
            self._early.append(text)
        else:
            self._log.write(text)
        return len(text)

    def flush(self) -> None:
        """Of the log."""
        if self._log is not None:
            self._log.flush()

    def say(self, line: str) -> None:
        """Show a line, and note it."""
        self.write(f"{line}\n")
        print(line, file=self.terminal, flush=True)

    def keep(self, folder: Path) -> None:
        """Write the log into a run's folder, behind those of earlier starts."""
        if self._log is not None:
            return
        path = folder / FOLDER / f"rank_{int(os.environ.get('RANK', 0)):05d}.log"
        with contextlib.suppress(OSError):  # it is no reason not to train
            path.parent.mkdir(parents=True, exist_ok=True)
            self._log = path.open("a", buffering=1, errors="replace")
            self._log.writelines(self._early)
            self._early.clear()


def say(line: str) -> None:
    """Print a line of the program's own."""
    if isinstance(sys.stdout, Console):
        sys.stdout.say(line)
    else:
        print(line, flush=True)


def keep(folder: str | Path | None) -> None:
    """Keep the log there from now on, see `Console.keep`."""
    if folder is not None and isinstance(sys.stdout, Console):
        sys.stdout.keep(Path(folder))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Show nothing but what is said, and errors, as long as it lasts."""
    terminal = sys.stdout
    console = Console(terminal)

    def note(message: Any, category: Any, file: Any, line: int, *rest: Any) -> None:
        console.write(warnings.formatwarning(message, category, file, line))

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(console))
        stack.callback(setattr, warnings, "showwarning", warnings.showwarning)
        warnings.showwarning = note  # type: ignore[assignment]
        for handler in logging.root.handlers:  # Megatron's own, made when it was imported
            if isinstance(handler, logging.StreamHandler) and handler.stream is terminal:
                stack.callback(handler.setStream, handler.setStream(console))
        yield
