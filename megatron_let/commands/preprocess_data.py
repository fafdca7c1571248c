"""Tokenize texts into .bin/.idx pairs for Megatron, with Megatron's flags.

    megatron-let preprocess --input pile/*.jsonl.zst --output-prefix data/pile \\
        --tokenizer-model path/to/tokenizer --append-eod --workers 16

Killed, the same call goes on where it was.
"""

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import Any

from megatron_let.commands import mistakes_told, tool_parser
from megatron_let.data.engines import ENGINES
from megatron_let.data.preprocess import PreprocessConfig, left_out, preprocess
from megatron_let.data.sources import SUFFIXES
from megatron_let.data.tokenizer import TOKENIZER_TYPES, without_models


def _build_parser() -> ArgumentParser:
    """Every flag is a field of `PreprocessConfig`."""
    parser = tool_parser(__doc__, "preprocess")
    _add_data(parser.add_argument_group("input and output").add_argument)
    add_tokenizer(parser.add_argument_group("tokenizer").add_argument)
    _add_work(parser.add_argument_group("work").add_argument)
    return parser


def _add_data(add: Callable[..., Any]) -> None:
    inputs = (
        f"files, folders or quoted patterns, read in this order: {', '.join(SUFFIXES)} (a .txt "
        "file is one document)"
    )
    add("--input", nargs="+", required=True, metavar="PATH", help=inputs)
    prefix = "writes PREFIX_KEY_document.bin, .idx and .json for each key"
    add("--output-prefix", required=True, help=prefix)
    keys = "keys to tokenize, each into a dataset of its own (default: text)"
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help=keys)
    split = (
        'a dataset for every value of KEY in a record\'s "meta", such as pile_set_name, and '
        "PREFIX_KEY_blend.txt for --data-args-path, which weighs them by their tokens"
    )
    add("--split-by-meta", metavar="KEY", help=split)
    eod = "end every document with the end-of-document token"
    add("--append-eod", action="store_true", help=eod)
    bad = (
        "what to do about a record that is no document: stop, or leave it out and list it in "
        "PREFIX_skipped.jsonl (default: %(default)s)"
    )
    add("--on-error", choices=["stop", "skip"], default=PreprocessConfig.on_error, help=bad)
    longest = (
        "million bytes of text that a document may have, of which the tokenizer's library takes up "
        "to 260 times as much memory (default: %(default)s)"
    )
    add("--max-document-mb", type=float, default=PreprocessConfig.max_document_mb, help=longest)


def add_tokenizer(add: Callable[..., Any]) -> None:
    """The flags of a `TokenizerConfig`, Megatron's."""
    types, default = TOKENIZER_TYPES, TOKENIZER_TYPES[0]
    add("--tokenizer-type", choices=types, default=default, help="default: %(default)s")
    model = "tokenizer folder or Hugging Face id, or SentencePiece model"
    add("--tokenizer-model", help=model)
    add("--vocab-file", help="vocab.json of GPT2BPETokenizer")
    add("--merge-file", help="merges.txt of GPT2BPETokenizer")
    add("--tokenizer-special-tokens", nargs="+", dest="special_tokens")
    add("--tokenizer-hf-no-use-fast", action="store_true")
    around = "leave out what the tokenizer adds around a text, such as BOS"
    add("--tokenizer-hf-no-include-special-tokens", action="store_true", help=around)
    add("--tokenizer-sentencepiece-legacy", action="store_true")
    add("--trust-remote-code", action="store_true", help="run code that comes with a tokenizer")


def _add_work(add: Callable[..., Any]) -> None:
    processes = "processes that tokenize (default: %(default)s)"
    add("--workers", type=int, default=PreprocessConfig.workers, help=processes)
    engine = (
        "gigatoken, the tokenizer's own library (tokenizers), or gigatoken as long as it proves to "
        "give the same ids (default: %(default)s)"
    )
    add("--engine", choices=ENGINES, default=PreprocessConfig.engine, help=engine)
    fraction = (
        "of the documents, the part that gigatoken's ids are compared on, behind the first hundred "
        "(default: %(default)s)"
    )
    add("--verify-fraction", type=float, default=PreprocessConfig.verify_fraction, help=fraction)
    lines = "documents between progress lines (default: %(default)s)"
    add("--log-interval", type=int, default=PreprocessConfig.log_interval, help=lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tool; a mistake of the user ends in one paragraph and exit status 2."""
    parser = _build_parser()
    values = vars(parser.parse_args(arguments))
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    if arguments is None and not values["trust_remote_code"]:  # this process does nothing else
        without_models()
    with mistakes_told(parser, (ValueError, OSError)):
        prefixes = preprocess(PreprocessConfig(**values))
    written = [f"Wrote {prefix}.bin, .idx and .json" for prefix in prefixes]
    print("\n".join(filter(None, [*written, left_out(prefixes[0])])))
