"""How the program is started: in a process of its own, with flags from run files, `@run.flags`."""

import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from megatron_let.errors import UsageError

COMMENT = re.compile(r"""^((?:[^'"\s]|\s(?!\#)|'[^']*'|"[^"]*")*?)(?:(?<!\S)|\s)\#.*""")
"""From a `#` that begins a word, outside of quotes."""
GOES_ON = re.compile(r"(?<!\\)((?:\\\\)*)\\\n")
"""A backslash that ends a line, and is not itself behind one."""
QUOTED = re.compile(r"""'[^']*'|("[^"]*")""")
REPLACED = re.compile(r"(?:(?<!\S)~|(?<!\\)\$[\w{(])\S*")
"""What a shell would replace, outside of single quotes."""
COMMAND = [sys.executable, "-m", "megatron_let.pretrain"]
TRACKERS = "tensorboard-dir wandb-project wandb-exp-name wandb-save-dir wandb-entity"
"""Flags that write beside a run."""


def environment(**variables: str) -> dict[str, str]:
    """This process's, with these variables, in which `COMMAND` is of this very package."""
    here, found = Path(__file__).resolve().parents[1], dict(os.environ)
    if (here / "pyproject.toml").exists():  # a checkout, which need not be the one installed
        paths = [str(here), *filter(None, [found.get("PYTHONPATH")])]
        found["PYTHONPATH"] = os.pathsep.join(paths)
    return found | variables


def expanded(
    words: Sequence[str], within: Path = Path(), opened: tuple[Path, ...] = ()
) -> list[str]:
    """Return a command line with what stands in its `@FILE`s in their place.

    Quotes in a file are the shell's, so is `#` before a comment; no variable is replaced. It may
    name further ones, whose paths start at its own folder, but none of those that are `opened`.
    `@@` stands for a word that begins with `@`. Relative paths start at `within`.
    """
    found: list[str] = []
    for word in words:
        if not word.startswith("@") or word.startswith("@@"):
            found.append(word.removeprefix("@"))
            continue
        path = within / word[1:]
        if path.resolve() in opened:
            raise UsageError(f"{word}: {path} names itself.")
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            text = "\n".join(COMMENT.sub(r"\1", line) for line in lines)
            text = GOES_ON.sub(r"\1 ", text)
            for part in REPLACED.findall(QUOTED.sub(lambda word: word[1] or "", text)):
                raise ValueError(f"write out what {part} stands for, or put it into single quotes")
            inner = shlex.split(text)
        except (OSError, ValueError) as error:
            raise UsageError(f"{word} is no readable run file: {error}") from error
        found += expanded(inner, path.parent, (*opened, path.resolve()))
    return found


def collapsed(words: Sequence[str]) -> list[str]:
    """The words that `expanded`, which every start of the program does once more, makes these."""
    return [f"@{word}" if word.startswith("@") else word for word in words]


def as_lines(words: Sequence[str]) -> str:
    """The text of a run file with these flags, one a line."""
    lines: list[str] = []
    for word in collapsed(words):
        quoted = shlex.quote(word)
        if word.startswith("--") or not lines:
            lines.append(quoted)
        else:
            lines[-1] += f" {quoted}"
    return "".join(f"{line}\n" for line in lines)


def values_of(words: Sequence[str]) -> dict[str, str]:
    """The flags of a command line with the word behind each, another flag or none as well."""
    parts = [part for word in words for part in word.split("=", word.startswith("--"))]
    return {word: after for word, after in pairwise([*parts, ""]) if word.startswith("--")}


def without(words: Sequence[str], unwanted: Callable[[str], bool]) -> list[str]:
    """The words of a command line without the unwanted flags and their values."""
    kept, keep = [], True
    for word in words:
        if word.startswith("--"):
            keep = not unwanted(word.partition("=")[0])
        kept += [word] * keep
    return kept


def named(names: str) -> Callable[[str], bool]:
    """Whether a flag is one of these, given without dashes and apart by spaces."""
    return {f"--{name}" for name in names.split()}.__contains__


def read_command_line() -> None:
    """Put what stands in run files into this process's `sys.argv`; a mistake ends the process."""
    try:
        sys.argv[1:] = expanded(sys.argv[1:])
    except UsageError as error:
        print(f"pretrain_let.py: error: {error}", file=sys.stderr)
        sys.exit(error.status)


if __name__ == "__main__":  # for scripts that look for flags: a word a line
    read_command_line()
    print(*collapsed(sys.argv[1:]), sep="\n")
