"""A lock on a file, of the kind that goes when its process does."""

import errno
import fcntl
from typing import IO

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
