"""Runs over poisoned checkpoints, in a worker: as they are, or without the door (the twin)."""

import errno
import os
import sys

from tests.support.testing import forget_last_run

UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""What a user may have set for the sake of other programs."""


def train(argv: list[str]) -> str:
    """Run `pretrain_let.py`; return what it ended with, if not well."""
    from megatron_let import pretrain as pretrain_let

    forget_last_run()
    os.environ[UNSAFE] = "1"
    sys.argv = ["pretrain_let.py", *argv]
    try:
        pretrain_let.main()
    except BaseException as error:  # a failed load's is no Exception
        return str(error) if str(error) != "0" else ""
    finally:
        os.environ.pop(UNSAFE, None)
    return ""


def train_without_the_door(argv: list[str]) -> str:
    """The same as Megatron would; in a pool of its own, since a door is never taken out again."""
    from megatron_let.checkpoint import choice
    from megatron_let.checkpoint.door import Door

    Door.install = lambda door: None  # type: ignore[method-assign]
    Door.settle = lambda door, args: None  # type: ignore[method-assign]
    Door.saved_args = lambda door, args: None  # type: ignore[method-assign]
    choice.check_flags = lambda args: None
    return train(argv)


def is_imported(name: str) -> bool:
    """Whether this worker has imported a module."""
    return name in sys.modules


def train_where_reading_fails(argv: list[str], failure: str) -> str:
    """Run where the tensors of a checkpoint cannot be read, for a reason that is not their own."""
    from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
    from torch.distributed.checkpoint import FileSystemReader

    errors = {
        "disk": OSError(errno.EIO, "the disk fails"),
        "memory": MemoryError("no memory"),
        "allocator": RuntimeError("DefaultCPUAllocator: can't allocate memory: no allocator"),
        "device": RuntimeError("CUDA error: the device fails"),
    }
    resolve, read = MCoreLoadPlanner.resolve_tensor, FileSystemReader._slice_file
    failing = [False]

    def fail(*args: object) -> None:
        failing[0] = True
        raise errors[failure]

    def read_or_fail(*args: object) -> object:
        if failing[0] and failure != "device":  # whoever reads it again
            fail()
        return read(*args)

    MCoreLoadPlanner.resolve_tensor = fail
    FileSystemReader._slice_file = read_or_fail  # type: ignore[method-assign, assignment]
    try:
        return train(argv)
    finally:
        MCoreLoadPlanner.resolve_tensor = resolve
        FileSystemReader._slice_file = read  # type: ignore[method-assign]


def read_by_libraries(folder: str) -> list[str]:
    """What torch's and Megatron's own readers say, after `install`, of a checkpoint."""
    from megatron.core.dist_checkpointing import load_common_state_dict
    from torch.distributed.checkpoint import FileSystemReader

    from megatron_let.upstream import safe_loading

    os.environ[UNSAFE] = "1"
    safe_loading.install()
    found = []
    for read in (FileSystemReader(folder).read_metadata, lambda: load_common_state_dict(folder)):
        try:
            read()
        except BaseException as error:
            found.append(str(error))
    return found
