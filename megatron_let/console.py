"""The console shows the program's own lines; what libraries print goes to a log.

`say` is how the program speaks. Each rank that prints anything keeps a log of all of it in the
run's folder; without one it is lost, and `--verbose-console` shows everything instead.
"""

import contextlib
import errno
import io
import logging
import os
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from megatron_let.errors import UsageError

LOUD = {"--verbose-console", "-h", "--help"}
"""With one of these everything is shown."""


class Console(io.TextIOBase):
    """In the place of `sys.stdout`: what is written goes to the log alone."""

    def __init__(self, terminal: TextIO) -> None:
        self.terminal = terminal
        self.is_kept = False
        self.early: deque[str] = deque(maxlen=20_000)
        """Until it is known where the log is."""
        self.path: Path | None = None
        self._log: TextIO | None = None

    def write(self, text: str) -> int:
        """Note it. A log that cannot be written is given up: it is no reason not to train."""
        if not isinstance(text, str):
            raise TypeError(f"{type(text).__name__} is no text")
        if not self.is_kept:
            self.early.append(text)
        elif self.path is not None:
            try:
                if self._log is None:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    self._log = self.path.open("a", buffering=1, errors="replace")
                self._log.write(text)
            except OSError:
                self.path = None
        return len(text)


def show(line: str, terminal: TextIO) -> None:
    """Print a line. A terminal that is gone is no reason not to train either."""
    try:
        print(line, file=terminal, flush=True)
    except OSError as error:
        if error.errno != errno.ENOSPC:  # which may pass; what is left in the buffer fails again
            with open(os.devnull, "wb") as nowhere, contextlib.suppress(OSError):
                os.dup2(nowhere.fileno(), terminal.fileno())


def say(line: str) -> None:
    """Print a line of the program's own, and note it."""
    if isinstance(sys.stdout, Console):
        show(line, sys.stdout.terminal)
        sys.stdout.write(f"{line}\n")
    else:
        show(line, sys.stdout)


def keep(folder: Path | None) -> None:
    """Write the log into a run's folder, behind those of earlier starts; None keeps none."""
    console = sys.stdout
    if isinstance(console, Console) and not console.is_kept:
        rank = int(os.environ.get("RANK", "0"))
        console.path = None if folder is None else folder / f"console/rank_{rank:05d}.log"
        console.is_kept, early = True, "".join(console.early)
        if early:
            console.write(early)


@contextlib.contextmanager
def quiet(words: Iterable[str]) -> Iterator[None]:
    """Show nothing but what is said, and errors, as long as it lasts; unless a flag is `LOUD`."""
    if not LOUD.isdisjoint(words):
        yield
        return
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
        try:
            yield
        except UsageError:
            raise
        except BaseException as error:  # Megatron says some things only on its way out
            if not console.is_kept and not (isinstance(error, SystemExit) and error.code == 2):
                print(*"".join(console.early).splitlines()[-20:], sep="\n", file=sys.stderr)
            raise
