"""Files that appear whole or not at all, their sums, and a lock that goes when its process does."""

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What a file system says that has none, as Lustre often does."""


def lock(file: IO[str]) -> bool | None:
    """Try to lock it; False if another process has it, None if this file system has no locks.

    Not by `flock`, which children inherit: those of a killed process would hold it a moment longer.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True


def commit(file: BinaryIO) -> int:
    """Bring what was written to the disk; return the file's size."""
    file.flush()
    os.fsync(file.fileno())
    return file.tell()


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears whole or not at all, in the place of the one before."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        yield file
        commit(file)
    partial.replace(path)


def write_whole(path: Path, text: str) -> None:
    """Write a small file so."""
    with whole_file(path) as file:
        file.write(text.encode())


def sha256(path: Path) -> str:
    """A file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
