"""One run at a time writes into a `--save`: a second one hears who the first is.

Rank 0 holds a lock on a file there, which goes when the process does. The file names its holder and
is touched every few seconds: that tells a run from a lost node whose lock an NFS server still
keeps, and is all there is on a file system without locks.
"""

import contextlib
import datetime
import os
import platform
import threading
import time
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from megatron_let.console import say
from megatron_let.errors import MachineError
from megatron_let.files import lock

FILE = "run.lock"
BEAT_SECONDS = 5.0
PATIENCE_SECONDS = 30.0
"""So long a start waits for one that may be dying, as after a requeue; more than some beats."""


def save_folder(argv: Sequence[str]) -> Path | None:
    """Return what `--save` names on a command line."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--save", type=Path, nargs="?")
    return parser.parse_known_args(argv)[0].save


@contextlib.contextmanager
def one_run_in(save: Path | None) -> Iterator[None]:
    """Hold the lock of `save` on rank 0; `MachineError` if it is another run's or not writable."""
    if save is None or os.environ.get("RANK", "0") != "0":
        yield
        return
    is_new, path, ended = not save.exists(), save / FILE, threading.Event()
    try:
        file = _hold(path)
    except OSError as error:
        raise MachineError(f"--save {save} cannot be written: {error}") from error
    threading.Thread(target=_beat, args=(file, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        with contextlib.suppress(OSError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:  # not of who took its place
                path.unlink()
            if is_new:
                save.rmdir()  # refused flags leave nothing behind
        file.close()


def _hold(path: Path) -> IO[str]:
    """Return the open lock file; closing it gives the lock back."""
    deadline, first_touched = time.monotonic() + PATIENCE_SECONDS, None
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", errors="replace")
        is_locked, stat = lock(file), os.fstat(file.fileno())
        file.seek(0)
        holder = file.read().strip()
        if is_locked or (is_locked is None and not holder):
            with contextlib.suppress(FileNotFoundError):  # its holder removed it just now
                if path.stat().st_ino == stat.st_ino:
                    return _sign(file, is_locked is None)
            continue
        file.close()
        if first_touched is None:
            first_touched = stat.st_mtime_ns
            say(f"> --save {path.parent} is in use by {holder}: waiting for its end")
        if time.monotonic() > deadline:
            is_here = is_locked is False and holder.startswith(f"{platform.node()},")
            if is_here or stat.st_mtime_ns != first_touched:
                raise MachineError(
                    f"--save {path.parent} belongs to another run: {holder}. Two runs would "
                    "overwrite each other's checkpoints: end that one, or choose another --save."
                )
            say(f"> {holder}: gives no sign of life, this run takes its place")
            path.unlink(missing_ok=True)
        time.sleep(0.2)


def _sign(file: IO[str], without_locks: bool) -> IO[str]:
    if without_locks:
        say(f"> no locks on this file system: another run is known by {file.name}'s age alone")
    now = datetime.datetime.now(datetime.UTC)
    file.truncate(0)
    file.write(f"{platform.node()}, process {os.getpid()}, since {now:%Y-%m-%d %H:%M:%S} UTC\n")
    file.flush()
    return file


def _beat(file: IO[str], ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError, ValueError):  # a server that is away; closed just now
            os.utime(file.fileno())
