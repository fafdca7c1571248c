"""Tokenize texts into .bin/.idx pairs for Megatron, with Megatron's flags.

    python tools/preprocess_data.py --input pile/*.jsonl.zst --output-prefix data/pile \\
        --tokenizer-model path/to/tokenizer --append-eod --workers 16

Killed, the same call goes on where it was.
"""

import argparse
from collections.abc import Sequence

from megatron_let.data.engines import ENGINES
from megatron_let.data.preprocess import PreprocessConfig, preprocess
from megatron_let.data.sources import SUFFIXES
from megatron_let.data.tokenizer import TOKENIZER_TYPES, without_models


def build_parser() -> argparse.ArgumentParser:
    """Return the command line; every flag is a field of `PreprocessConfig`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_data(parser.add_argument_group("input and output"))
    _add_tokenizer(parser.add_argument_group("tokenizer"))
    _add_work(parser.add_argument_group("work"))
    return parser


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help=f"files, folders or quoted patterns, read in this order: {', '.join(SUFFIXES)} (a "
        ".txt file is one document)",
    )
    group.add_argument(
        "--output-prefix",
        required=True,
        help="writes PREFIX_KEY_document.bin, .idx and .json for each key",
    )
    group.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys to tokenize, each into a dataset of its own (default: text)",
    )
    group.add_argument(
        "--split-by-meta",
        metavar="KEY",
        help='a dataset for every value of KEY in a record\'s "meta", such as pile_set_name, and '
        "PREFIX_KEY_blend.txt for --data-args-path, which weighs them by their tokens",
    )
    group.add_argument(
        "--append-eod",
        action="store_true",
        help="end every document with the end-of-document token",
    )
    group.add_argument(
        "--on-error",
        choices=["stop", "skip"],
        default="stop",
        help="what to do about a record that is no document: stop, or leave it out and list it in "
        "PREFIX_skipped.jsonl (default: %(default)s)",
    )


def _add_tokenizer(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--tokenizer-type",
        choices=TOKENIZER_TYPES,
        default=TOKENIZER_TYPES[0],
        help="default: %(default)s",
    )
    group.add_argument(
        "--tokenizer-model", help="tokenizer folder or Hugging Face id, or SentencePiece model"
    )
    group.add_argument("--vocab-file", help="vocab.json of GPT2BPETokenizer")
    group.add_argument("--merge-file", help="merges.txt of GPT2BPETokenizer")
    group.add_argument("--tokenizer-special-tokens", nargs="+", dest="special_tokens")
    group.add_argument("--tokenizer-hf-no-use-fast", action="store_true")
    group.add_argument(
        "--tokenizer-hf-no-include-special-tokens",
        action="store_true",
        help="leave out what the tokenizer adds around a text, such as BOS",
    )
    group.add_argument("--tokenizer-sentencepiece-legacy", action="store_true")
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with a tokenizer"
    )


def _add_work(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--workers", type=int, default=1, help="processes that tokenize (default: %(default)s)"
    )
    group.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="gigatoken, the tokenizer's own library (tokenizers), or gigatoken as long as it "
        "proves to give the same ids (default: %(default)s)",
    )
    group.add_argument(
        "--verify-fraction",
        type=float,
        default=0.001,
        help="of the documents, the part that gigatoken's ids are compared on, behind the first "
        "hundred (default: %(default)s)",
    )
    group.add_argument(
        "--log-interval",
        type=int,
        default=100_000,
        help="documents between progress lines (default: %(default)s)",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tool; a mistake of the user ends in one paragraph and exit status 2."""
    parser = build_parser()
    values = vars(parser.parse_args(arguments))
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    if arguments is None and not values["trust_remote_code"]:  # this process does nothing else
        without_models()
    try:
        prefixes = preprocess(PreprocessConfig(**values))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print("\n".join(f"Wrote {prefix}.bin, .idx and .json" for prefix in prefixes))


if __name__ == "__main__":
    main()
