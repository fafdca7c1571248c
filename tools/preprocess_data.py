"""Tokenize .jsonl or .jsonl.zst files into .bin/.idx pairs for Megatron, with Megatron's flags."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_let.data.preprocess import (  # noqa: E402
    TOKENIZER_TYPES,
    PreprocessConfig,
    preprocess,
)


def build_parser() -> argparse.ArgumentParser:
    """Return the command line; every flag is a field of `PreprocessConfig`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help=".jsonl or .jsonl.zst files, read in this order",
    )
    parser.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys to tokenize, each into a dataset of its own (default: text)",
    )
    parser.add_argument(
        "--output-prefix",
        required=True,
        help="writes PREFIX_KEY_document.bin, .idx and .json for each key",
    )
    parser.add_argument(
        "--tokenizer-type",
        choices=TOKENIZER_TYPES,
        default=TOKENIZER_TYPES[0],
        help="default: %(default)s",
    )
    parser.add_argument(
        "--tokenizer-model", required=True, help="tokenizer folder or Hugging Face id"
    )
    parser.add_argument(
        "--tokenizer-hf-no-include-special-tokens",
        action="store_true",
        help="leave out what the tokenizer adds around a text, such as BOS",
    )
    parser.add_argument(
        "--append-eod",
        action="store_true",
        help="end every document with the end-of-document token",
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="processes that tokenize (default: %(default)s)"
    )
    parser.add_argument(
        "--log-interval",
        type=int,
        default=1000,
        help="documents between progress lines (default: %(default)s)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tool; a mistake of the user ends in one paragraph and exit status 2."""
    parser = build_parser()
    values = vars(parser.parse_args(arguments))
    values["input"], values["json_keys"] = tuple(values["input"]), tuple(values["json_keys"])
    try:
        prefixes = preprocess(PreprocessConfig(**values))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print("\n".join(f"Wrote {prefix}.bin, .idx and .json" for prefix in prefixes))


if __name__ == "__main__":
    main()
