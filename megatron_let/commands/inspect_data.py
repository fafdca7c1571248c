"""Check .bin/.idx pairs and show what is in them.

megatron-let inspect data/pile_text_document --tokenizer-model path/to/tokenizer
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

import numpy as np

from megatron_let.commands import tool_parser
from megatron_let.data import tokenizer
from megatron_let.data.inspect import Pair, check_tokens, checksum, open_pair, summary


def _build_parser() -> ArgumentParser:
    parser = tool_parser(__doc__, "inspect")
    add, types = parser.add_argument, tokenizer.TOKENIZER_TYPES
    add("prefix", nargs="+", help="dataset without .bin or .idx")
    add("--tokenizer-type", choices=types, default=types[0])
    add("--tokenizer-model", help="shows documents as text")
    add("--documents", type=int, default=2, help="documents to show (default 2)")
    add("--seed", type=int, default=0, help="which ones, drawn at random (default 0)")
    add("--vocab-size", type=int, help="default: the sidecar's")
    add("--checksum", action="store_true", help="print SHA-256 of the files")
    return parser


def _show(pair: Pair, options: Namespace) -> None:
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


def _show_documents(pair: Pair, options: Namespace) -> None:
    kind, model = options.tokenizer_type, options.tokenizer_model
    config = tokenizer.TokenizerConfig(tokenizer_type=kind, tokenizer_model=model)
    reader = tokenizer.load_tokenizer(config)
    full = np.flatnonzero(np.diff(pair.documents))
    number = min(options.documents, len(full))
    for index in sorted(np.random.default_rng(options.seed).choice(full, number, replace=False)):
        ids = pair.document(int(index))
        text = reader.detokenize(ids[:100].tolist())
        print(f"\ndocument {index:,} ({len(ids):,} tokens): {text}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tool; a damaged dataset ends in one paragraph and exit status 2."""
    parser = _build_parser()
    options = parser.parse_args(arguments)
    if arguments is None:  # this process does nothing else
        tokenizer.without_models()
    for prefix in options.prefix:
        try:
            _show(open_pair(prefix), options)
        except (ValueError, OSError) as error:
            parser.exit(2, f"{parser.prog}: {error}\n")
