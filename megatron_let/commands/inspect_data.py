"""Check .bin/.idx pairs and show what is in them.

python tools/inspect_data.py data/pile_text_document --tokenizer-model path/to/tokenizer
"""

import argparse
from collections.abc import Sequence

import numpy as np

from megatron_let.data.inspect import Pair, check_tokens, checksum, open_pair, summary
from megatron_let.data.tokenizer import (
    TOKENIZER_TYPES,
    TokenizerConfig,
    load_tokenizer,
    without_models,
)


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prefix", nargs="+", help="dataset without .bin or .idx")
    parser.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, default=TOKENIZER_TYPES[0])
    parser.add_argument("--tokenizer-model", help="shows documents as text")
    parser.add_argument("--documents", type=int, default=2, help="documents to show (default 2)")
    parser.add_argument(
        "--seed", type=int, default=0, help="which ones, drawn at random (default 0)"
    )
    parser.add_argument("--vocab-size", type=int, help="default: the sidecar's")
    parser.add_argument("--checksum", action="store_true", help="print SHA-256 of the files")
    return parser


def show(pair: Pair, options: argparse.Namespace) -> None:
    """Print what is asked for of one dataset.

    Raises:
        ValueError: it is damaged.
    """
    print(summary(pair))
    vocab_size = options.vocab_size or pair.sidecar.get("vocab_size")
    if vocab_size:
        check_tokens(pair, vocab_size)
        print("\nwhole: sizes, order, counts and every token id were checked")
    else:
        print("\nwhole: sizes and order were checked; --vocab-size checks the token ids")
    if options.checksum:
        for suffix, digest in checksum(pair).items():
            print(f"sha256 {digest}  {pair.prefix}{suffix}")
    if options.tokenizer_model:
        _show_documents(pair, options)


def _show_documents(pair: Pair, options: argparse.Namespace) -> None:
    config = TokenizerConfig(
        tokenizer_type=options.tokenizer_type, tokenizer_model=options.tokenizer_model
    )
    tokenizer = load_tokenizer(config)
    full = np.flatnonzero(np.diff(pair.documents))
    number = min(options.documents, len(full))
    for index in sorted(np.random.default_rng(options.seed).choice(full, number, replace=False)):
        ids = pair.document(int(index))
        text = tokenizer.detokenize(ids[:100].tolist())
        print(f"\ndocument {index:,} ({len(ids):,} tokens): {text}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tool; a damaged dataset ends in one paragraph and exit status 2."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if arguments is None:  # this process does nothing else
        without_models()
    for prefix in options.prefix:
        try:
            show(open_pair(prefix), options)
        except (ValueError, OSError) as error:
            parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
