"""A folder that is written beside its place and takes its name when it is complete."""

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from megatron_let.errors import UsageError


def check_free(output: Path) -> None:
    """Refuse to overwrite.

    Raises:
        UsageError: `output` exists and is not an empty folder.
    """
    output = output.resolve()
    if output.is_mount():
        raise UsageError(f"--output {output} is a mount point: give a folder in it.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(
            f"--output {output} is not empty, and nothing is overwritten. Remove it or choose "
            "another folder."
        )


@contextlib.contextmanager
def complete_or_absent(output: Path) -> Iterator[Path]:
    """Give a folder beside `output` to write into; it takes that name if nothing fails."""
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    # Of its own name, so that two exports to one place do not write into each other.
    partial = output.with_name(f"{output.name}.partial-{uuid.uuid4().hex}")
    partial.mkdir()
    try:
        yield partial
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
