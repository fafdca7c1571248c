"""The tools: a command line each."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import Any


def tool_parser(doc: str | None, name: str | None = None, **options: Any) -> ArgumentParser:
    """Return a parser whose `--help` begins with a module's docstring, line by line."""
    form = RawDescriptionHelpFormatter
    return ArgumentParser(prog=name, description=doc, formatter_class=form, **options)
