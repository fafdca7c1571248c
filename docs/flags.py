"""Write docs/flags.md from the program's own `--help`.

.venv/bin/python docs/flags.py
"""

import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Our flags

Made by `.venv/bin/python docs/flags.py` from the program's `--help`; all others are Megatron-LM's,
unchanged. Where a default comes from: [methods.md](methods.md). Flags may stand in files,
`pretrain_let.py @run.flags` ([cluster.md](cluster.md#recipes)).

A flag without effect is refused, and an unknown one gets the nearest name.
"""


def page() -> str:
    """The page."""
    from megatron_let.training.arguments import add_groups, groups

    parser = ArgumentParser(add_help=False)
    return "\n".join([HEAD, *rows(add_groups(parser, groups()))]) + "\n"


def rows(parser: ArgumentParser) -> Iterator[str]:
    """A table for each group of flags."""
    for group in parser._action_groups:
        if not (group.title or "").startswith("megatron_let: "):
            continue
        yield f"## {(group.title or '').removeprefix('megatron_let: ')}\n"
        yield "| flag | default | meaning |\n|---|---|---|"
        for action in group._group_actions:
            flag = ", ".join(action.option_strings)
            choices = "{" + ",".join(action.choices) + "}" if action.choices else ""
            is_set = action.default is not None and action.default is not False
            default = str(action.default) if is_set else ""
            words = " ".join((action.help or "").split()).replace("|", "\\|")
            yield f"| `{' '.join(filter(None, [flag, choices]))}` | {default} | {words} |"
        yield ""


def main() -> None:
    """Write it."""
    from megatron_let.upstream import cpu

    cpu.activate()
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
