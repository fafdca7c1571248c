"""The tools: a command line each."""

from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from typing import Any


def tool_parser(doc: str | None, name: str, **options: Any) -> ArgumentParser:
    """Return the parser of a command, whose `--help` begins with its docstring, line by line."""
    form = RawDescriptionHelpFormatter
    prog = f"megatron-let {name}"  # which a checkout has as well
    return ArgumentParser(prog=prog, description=doc, formatter_class=form, **options)


def number(word: str, least: int = 1) -> int:
    """The value of a flag that counts something."""
    if not (word.isdecimal() and int(word) >= least):
        raise ArgumentTypeError(f"{word} is no number from {least} on")
    return int(word)
