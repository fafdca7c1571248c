"""SHA-256 sums of a checkpoint's files, made while training goes on.

Megatron's own are made by rank 0 while all ranks wait. Here each rank sums the files that it has
written, in a thread, and rank 0 puts the sums together in Megatron's format. A run that is killed
before leaves a whole checkpoint without sums.
"""

import contextlib
import json
import os
import threading
import time
from pathlib import Path

import torch

from megatron_let.checkpoint.folder import SUMS
from megatron_let.console import say
from megatron_let.files import sha256, write_whole
from megatron_let.upstream.loop_hooks import Listener, Save

PARTS = "integrity_{}.part"
PATIENCE_SECONDS = 600.0
"""So long rank 0 waits for the others' sums."""
LAST_SECONDS = 20.0
"""So long the end of a run waits for its last sums; torchrun kills 30 s after a SIGTERM."""


class Sums(Listener):
    """Sums one checkpoint after the other in the background; no error of it ends the run."""

    def __init__(self) -> None:
        self._newest: threading.Thread | None = None

    def before_save(self, save: Save) -> None:
        """Remove the sums of an older attempt before its files are written again."""
        if save.folder and os.environ.get("RANK", "0") == "0":
            for path in (save.folder / SUMS, *save.folder.glob(PARTS.format("*"))):
                path.unlink(missing_ok=True)

    def after_save(self, folder: Path) -> None:
        """Sum a checkpoint whose files are all there."""
        ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        work = self._newest, folder, *ranks
        self._newest = threading.Thread(target=_sum_after, args=work, daemon=True)
        self._newest.start()

    def on_end(self, is_complete: bool) -> None:
        """Wait for what is being summed at the end of a run, for a while."""
        if self._newest is not None:
            self._newest.join(LAST_SECONDS)


def _sum_after(before: threading.Thread | None, folder: Path, rank: int, ranks: int) -> None:
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # this thread's, on Linux
        if before is not None:
            before.join()
        own = sorted(folder.glob(f"*__{rank}_*.distcp"))
        part = {path.name: sha256(path) for path in own}
        write_whole(folder / PARTS.format(rank), json.dumps(part))
        if rank == 0:
            _put_together(folder, [folder / PARTS.format(other) for other in range(ranks)])
    except Exception as error:  # a full disk, or a checkpoint that has been removed
        say(f"> {folder} stays without sums: {error}")


def _put_together(folder: Path, parts: list[Path]) -> None:
    deadline, pause, missing = time.monotonic() + PATIENCE_SECONDS, 0.05, parts
    while missing := [part for part in missing if not part.exists()]:
        if time.monotonic() > deadline or not folder.exists():
            raise TimeoutError(f"no {', '.join(part.name for part in missing)} came")
        time.sleep(pause)
        pause = min(2 * pause, 2.0)  # a thousand files are asked for
    sums = {name: sha for part in parts for name, sha in json.loads(part.read_text()).items()}
    for path in folder.iterdir():  # what all ranks share, and files of an older layout
        if path.is_file() and path.name not in sums and path not in parts and path.name != SUMS:
            sums[path.name] = sha256(path)
    manifest = {"algorithm": "sha256", "files": dict(sorted(sums.items()))}
    write_whole(folder / SUMS, json.dumps(manifest, indent=2))
    for part in parts:
        with contextlib.suppress(OSError):
            part.unlink()
