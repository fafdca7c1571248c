"""A small file system of its own, which really is full when it is full."""

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

REASON = "this process may not mount a tmpfs (CAP_SYS_ADMIN)"


def can_mount() -> bool:
    """Whether this process may mount a tmpfs: has CAP_SYS_ADMIN."""
    status = Path("/proc/self/status").read_text()
    mask = next(line for line in status.splitlines() if line.startswith("CapEff")).split()[1]
    return bool(int(mask, 16) >> 21 & 1)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[], object]]:
    """Mount a tmpfs of `size` bytes on an empty folder; yields what makes room on it."""
    mount = ["mount", "-t", "tmpfs", "-o"]
    subprocess.run([*mount, f"size={size}", "tmpfs", folder], check=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=64M", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
