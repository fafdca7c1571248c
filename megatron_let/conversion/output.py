"""A folder that is written beside its place and takes its name when it is complete."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_let.errors import UsageError


def check_free(output: Path) -> None:
    """Refuse to overwrite.

    Raises:
        UsageError: `output` exists and is not an empty folder.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(
            f"--output {output} is not empty, and nothing is overwritten. Remove it or choose "
            "another folder."
        )


@contextlib.contextmanager
def complete_or_absent(output: Path) -> Iterator[Path]:
    """Give a folder beside `output` to write into; it takes that name if nothing fails."""
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed export
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
