"""Keeps a run's newest checkpoints and removes older ones (`--save-keep-last`).

Megatron's own `--save-retain-interval` leaves the newest alone between two kept ones: if that is
damaged, the run falls back by a whole interval.
"""

import os
import shutil
import threading
import time
from argparse import Namespace
from pathlib import Path

from megatron_let.checkpoint.folder import TRACKER, is_written, iteration_folders

LEAVING = "removing_"
"""A folder that is being removed has another name: half of it must not pass for a checkpoint."""


class Retention:
    """Removes what `--save-keep-last` does not keep; does nothing without it, or on other ranks.

    Nothing goes before this start has saved: until then an older checkpoint may be all it has.

    Args:
        args: `--save`, `--save-keep-last`, and `--save-retain-interval`, whose multiples stay.
        here: whether this rank removes.
    """

    def __init__(self, args: Namespace, here: bool) -> None:
        self._save = Path(args.save) if args.save and args.save_keep_last and here else None
        self._keep_last = args.save_keep_last
        self._keep_every = args.save_keep_every
        self._tracked = self._tracker()
        self._removing: threading.Thread | None = None

    def _tracker(self) -> str:
        tracker = self._save / TRACKER if self._save else None
        return tracker.read_text().strip() if tracker and tracker.is_file() else ""

    def apply(self) -> None:
        """Remove, in a thread, what a new checkpoint has made superfluous.

        A folder that cannot be removed is told of, and the run goes on.
        """
        if self._save is None or (self._removing is not None and self._removing.is_alive()):
            return
        try:
            tracked = self._tracker()
            if tracked == self._tracked or not tracked.isdecimal():
                return
            self._tracked = tracked
            for folder in superfluous(self._save, int(tracked), self._keep_last, self._keep_every):
                os.replace(folder, folder.with_name(f"{LEAVING}{folder.name}.{time.time_ns()}"))
        except OSError as error:
            print(f"> --save-keep-last: {error}", flush=True)
        self._removing = threading.Thread(target=_remove, args=(self._save,))
        self._removing.start()  # the interpreter waits for it at its end

    def finish(self) -> None:
        """The same at a run's end, whatever is still being removed."""
        if self._removing is not None:
            self._removing.join()
        self.apply()


def superfluous(save: Path, newest: int, keep_last: int, keep_every: int | None) -> list[Path]:
    """Return the checkpoints that need not be kept, the oldest first.

    Args:
        save: the run's folder.
        newest: iteration of the newest complete checkpoint; later folders are being written.
        keep_last: how many to keep, the newest among them; a half-written one does not count.
        keep_every: checkpoints at its multiples are kept as well.
    """
    found = {s: path for s, path in iteration_folders(save).items() if not path.is_symlink()}
    whole = [s for s in sorted(found, reverse=True) if s <= newest and is_written(found[s])]
    if len(whole) < keep_last:
        return []
    oldest_kept = whole[keep_last - 1]
    old = sorted(step for step in found if step < oldest_kept)
    return [found[step] for step in old if keep_every is None or step % keep_every]


def _remove(save: Path) -> None:
    """Remove what was renamed, by an earlier start too."""
    for folder in save.glob(f"{LEAVING}*"):
        shutil.rmtree(folder, ignore_errors=True)
