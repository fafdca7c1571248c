"""The tools: a command line each."""

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_let.errors import UsageError
from megatron_let.program import expanded


def tool_parser(doc: str | None, name: str, **options: Any) -> ArgumentParser:
    """Return the parser of a command, whose `--help` begins with its docstring, line by line."""
    form = RawDescriptionHelpFormatter
    prog = f"megatron-let {name}"  # which a checkout has as well
    return ArgumentParser(prog=prog, description=doc, formatter_class=form, **options)


def parse_beside_run(
    parser: ArgumentParser, arguments: Sequence[str] | None
) -> tuple[Namespace, list[str]]:
    """Return a command's own options and the flags of a run, which may stand in run files."""
    with mistakes_told(parser):
        return parser.parse_known_args(expanded(sys.argv[1:] if arguments is None else arguments))


@contextmanager
def mistakes_told(
    parser: ArgumentParser, kinds: tuple[type[Exception], ...] = (UsageError,)
) -> Iterator[None]:
    """End the process with one paragraph for an exception of these kinds."""
    try:
        yield
    except kinds as error:
        status = error.status if isinstance(error, UsageError) else UsageError.status
        parser.exit(status, f"{parser.prog}: error: {error}\n")


def labelled(word: str) -> tuple[str, Path]:
    """The label, or an empty one, and the folder of `[LABEL=]FOLDER`; both may hold the sign."""
    parts = word.split("=")
    for at in range(len(parts)):
        if (folder := Path("=".join(parts[at:]))).exists():
            return "=".join(parts[:at]), folder
    return "", Path(word.partition("=")[2] or word)


def number(word: str, least: int = 1) -> int:
    """The value of a flag that counts something."""
    if not (word.isdecimal() and int(word) >= least):
        raise ArgumentTypeError(f"{word} is no number from {least} on")
    return int(word)
