"""Convert checkpoints; `to-hf` writes a run's checkpoint as a Hugging Face folder, on CPU."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_let.conversion.to_hf import DTYPES, ExportConfig, export, sample  # noqa: E402
from megatron_let.errors import UsageError  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    """Return the command line, one subcommand a direction."""
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint.py", description=__doc__, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser(
        "to-hf", help="Megatron's torch_dist to a Hugging Face folder", allow_abbrev=False
    )
    _add_to_hf_flags(to_hf)
    return parser


def _add_to_hf_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--load", type=Path, required=True, metavar="DIR", help="the run's --save")
    parser.add_argument("--ckpt-step", type=int, metavar="N", help="iteration (default: latest)")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="new folder to write"
    )
    parser.add_argument(
        "--tokenizer-model", metavar="FOLDER", help="folder or hub id (default: the run's own)"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: as saved")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="default: %(default)s"
    )
    parser.add_argument(
        "--sample", metavar="PROMPT", help="load the result and print how it goes on after this"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tool; a mistake of the user ends in one paragraph and exit status 2."""
    parser = build_parser()
    values = vars(parser.parse_args(arguments))
    prompt = values.pop("sample")
    values.pop("command")
    try:
        folder = export(ExportConfig(**values))
        print(f"Wrote {folder}")
        if prompt is not None:
            print(sample(folder, prompt))
    except (UsageError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
