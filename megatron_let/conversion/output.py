"""What is written: a folder that takes its name when it is complete, and files piece by piece."""

import contextlib
import fcntl
import glob
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_let.errors import UsageError

PIECE_BYTES = 256 * 1024
"""Written at once. Larger pieces make the page cache ask for large pages, which a virtual machine
may have given back to its host: ten times slower there (docs/benchmarks.md, "Conversion")."""
ALONE = fcntl.LOCK_EX | fcntl.LOCK_NB


def check_free(output: Path) -> None:
    """Refuse what exists and is not an empty folder."""
    output = output.resolve()
    if output.is_mount():
        raise UsageError(f"--output {output} is a mount point: give a folder in it.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"--output {output} is not empty: nothing is overwritten. Choose another.")


@contextlib.contextmanager
def complete_or_absent(output: Path) -> Iterator[Path]:
    """Give a folder near `output` to write into; it takes that name if nothing fails.

    What killed processes left of one is removed: nobody holds its lock any more.
    """
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    # Of its own name, so that two exports to one place do not write into each other.
    name, place = f"{output.name}.partial-", output.parent
    for left in place.glob(f"{glob.escape(name)}*/lock"):
        with contextlib.suppress(OSError), left.open("a") as file:
            fcntl.flock(file, ALONE)
            shutil.rmtree(left.parent)
    with (
        TemporaryDirectory(prefix=name, dir=place, ignore_cleanup_errors=True) as parent,
        Path(parent, "lock").open("w") as lock,
    ):
        with contextlib.suppress(OSError):  # a file system without locks: it stays
            fcntl.flock(lock, ALONE)
        partial = Path(parent, output.name)
        partial.mkdir()
        yield partial
        partial.rename(output)


class PiecewiseFile(io.FileIO):
    """Written in pieces of `PIECE_BYTES`."""

    def write(self, data: Any) -> int:
        """Write all of it; returns the bytes."""
        view = memoryview(data).cast("B")
        size = len(view)
        while view:
            view = view[super().write(view[:PIECE_BYTES]) :]
        return size
