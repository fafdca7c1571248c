"""Keeps a run's newest checkpoints and removes older ones (`--save-keep-last`).

Megatron's own `--save-retain-interval` leaves the newest alone between two kept ones: if that is
damaged, the run falls back by a whole interval.
"""

import os
import shutil
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_let.checkpoint.folder import is_written, iteration_folders, step_of
from megatron_let.console import say
from megatron_let.upstream.loop_hooks import Listener

LEAVING = "removing_"
"""A folder that is being removed has another name: half of it must not pass for a checkpoint."""


class Retention(Listener):
    """Removes what `--save-keep-last` does not keep, nor `--save-retain-interval` beside it."""

    def __init__(self, args: Namespace) -> None:
        self._save = Path(args.save or "")
        self._keep_last = args.save_keep_last
        self._keep_every = args.save_keep_every
        self._pool = ThreadPoolExecutor(1)  # the interpreter waits for it at its end

    def after_save(self, folder: Path) -> None:
        """Remove, in a thread, what a new checkpoint has made superfluous."""
        if self._keep_last is not None and os.environ.get("RANK", "0") == "0":
            self._pool.submit(self._remove, step_of(folder), self._keep_last)

    def on_end(self, is_complete: bool) -> None:
        """Wait for what is being removed; a stop before the end leaves that to the interpreter."""
        self._pool.shutdown(wait=is_complete)

    def _remove(self, newest: int, keep_last: int) -> None:
        try:
            for folder in superfluous(self._save, newest, keep_last, self._keep_every):
                os.replace(folder, folder.with_name(f"{LEAVING}{folder.name}.{time.time_ns()}"))
        except OSError as error:
            say(f"> --save-keep-last: {error}")
        for folder in self._save.glob(f"{LEAVING}*"):  # by an earlier start too
            shutil.rmtree(folder, ignore_errors=True)


def superfluous(save: Path, newest: int, keep_last: int, keep_every: int | None) -> list[Path]:
    """Return the checkpoints of a run that need not be kept, the oldest first.

    Of those up to iteration `newest` (later folders are being written) the last `keep_last` stay,
    not counting half-written ones, and all at multiples of `keep_every`.
    """
    found = {s: path for s, path in iteration_folders(save).items() if not path.is_symlink()}
    whole = [s for s in sorted(found, reverse=True) if s <= newest and is_written(found[s])]
    if len(whole) < keep_last:
        return []
    oldest_kept = whole[keep_last - 1]
    old = sorted(step for step in found if step < oldest_kept)
    return [found[step] for step in old if keep_every is None or step % keep_every]
