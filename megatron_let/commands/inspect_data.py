"""Check .bin/.idx pairs and show what is in them.

megatron-let inspect data/pile_text_document --tokenizer-model path/to/tokenizer
"""

from argparse import Namespace
from collections.abc import Sequence
from functools import partial

import numpy as np

from megatron_let.commands import mistakes_told, number, tool_parser
from megatron_let.data import tokenizer
from megatron_let.data.inspect import Pair, check_tokens, checksum, open_pair, summary


def _show(pair: Pair, options: Namespace) -> None:
    print(summary(pair))
    vocab_size = options.vocab_size or pair.sidecar.get("vocab_size")
    reader = _reader(pair, options) if options.tokenizer_model else None
    if vocab_size := vocab_size or (reader and reader.vocab_size):
        check_tokens(pair, vocab_size)
        print("\nwhole: sizes, order, counts and every token id were checked")
    else:
        print("\nwhole: sizes and order were checked; --vocab-size checks the token ids")
    if options.checksum:
        for suffix, digest in checksum(pair).items():
            print(f"sha256 {digest}  {pair.prefix}{suffix}")
    if reader is None:
        return
    full = np.flatnonzero(np.diff(pair.documents))
    wanted = min(options.documents, len(full))
    for index in sorted(np.random.default_rng(options.seed).choice(full, wanted, replace=False)):
        ids = pair.document(int(index))
        text = reader.detokenize(ids[:100].tolist())
        print(f"\ndocument {index:,} ({len(ids):,} tokens): {text}")


def _reader(pair: Pair, options: Namespace) -> tokenizer.Tokenizer:
    kind, model = options.tokenizer_type, options.tokenizer_model
    config = tokenizer.TokenizerConfig(tokenizer_type=kind, tokenizer_model=model)
    reader = tokenizer.load_tokenizer(config)
    own = tokenizer.tokenizer_fingerprint(reader.ids())
    if (made_with := pair.sidecar.get("tokenizer_fingerprint", own)) != own:
        other = f"another tokenizer (fingerprint {made_with[:12]}) than --tokenizer-model {model}"
        print(f"\nWARNING: made with {other} ({own[:12]}): the text may not be what it was")
    return reader


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tool; a damaged dataset ends in one paragraph and exit status 2."""
    parser = tool_parser(__doc__, "inspect")
    add, types = parser.add_argument, tokenizer.TOKENIZER_TYPES
    add("prefix", nargs="+", help="dataset without .bin or .idx")
    add("--tokenizer-type", choices=types, default=types[0])
    add("--tokenizer-model", help="shows documents as text")
    from_0 = partial(number, least=0)
    add("--documents", type=from_0, default=2, help="documents to show (default 2)")
    add("--seed", type=from_0, default=0, help="which ones, drawn at random (default 0)")
    add("--vocab-size", type=number, help="default: the sidecar's, or the tokenizer's")
    add("--checksum", action="store_true", help="print SHA-256 of the files")
    options = parser.parse_args(arguments)
    if arguments is None:  # this process does nothing else
        tokenizer.without_models()
    with mistakes_told(parser, (ValueError, OSError)):
        for prefix in options.prefix:
            _show(open_pair(prefix), options)
