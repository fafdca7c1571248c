"""How the program is started: in a process of its own, with flags from run files, `@run.flags`."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_let.errors import UsageError

COMMAND = [sys.executable, "-m", "megatron_let.pretrain"]
"""What runs it."""


def environment(**variables: str) -> dict[str, str]:
    """This process's, with these variables, in which `COMMAND` is of this very package."""
    here = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": paths} | variables


def expanded(
    words: Sequence[str], within: Path = Path(), opened: tuple[Path, ...] = ()
) -> list[str]:
    """Return a command line with what stands in its `@FILE`s in their place.

    A file has a flag with its values on each line, `#` begins a comment, and quotes are the
    shell's. It may name further ones, whose paths start at its own folder. As on any command line
    the last value of a flag counts.

    Args:
        words: without the program.
        within: the folder that relative paths start at.
        opened: the files that are being read.

    Raises:
        UsageError: a file cannot be read, or names itself.
    """
    found: list[str] = []
    for word in words:
        if not word.startswith("@"):
            found.append(word)
            continue
        path = within / word[1:]
        if path.resolve() in opened:
            raise UsageError(f"{word}: {path} names itself.")
        try:
            lines = path.read_text().splitlines()
            inner = [part for line in lines for part in shlex.split(line, comments=True)]
        except (OSError, ValueError) as error:
            raise UsageError(f"{word} is no readable run file: {error}") from error
        found += expanded(inner, path.parent, (*opened, path.resolve()))
    return found


def as_lines(words: Sequence[str]) -> str:
    """The text of a run file with these flags, one a line."""
    lines: list[str] = []
    for word in words:
        if word.startswith("--") or not lines:
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return "".join(f"{line}\n" for line in lines)
