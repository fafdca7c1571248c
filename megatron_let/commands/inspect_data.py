"""Check .bin/.idx pairs and show what is in them.

megatron-let inspect data/pile_text_document --tokenizer-model path/to/tokenizer
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import fields
from functools import partial

import numpy as np

from megatron_let.commands import mistakes_told, number, tool_parser
from megatron_let.commands.preprocess_data import add_tokenizer
from megatron_let.data import tokenizer
from megatron_let.data.inspect import Pair, check_tokens, checksum, open_pair, summary
from megatron_let.errors import UsageError


def _show(pair: Pair, options: Namespace) -> None:
    print(summary(pair))
    reader = _reader(pair, options) if options.tokenizer_model or options.vocab_file else None
    ids = 1 + max(reader.ids().values()) if reader else 0
    if vocab_size := options.vocab_size or pair.sidecar.get("vocab_size") or ids:
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
        document = pair.document(int(index))
        beginning = document[:100].tolist()
        if (largest := max(beginning)) >= ids:
            raise UsageError(
                f"document {index:,} has the token id {largest}, and --tokenizer-model "
                f"{options.tokenizer_model} has {ids:,} tokens: give the tokenizer "
                "that the data were made with."
            )
        print(f"\ndocument {index:,} ({len(document):,} tokens): {reader.detokenize(beginning)}")


def _reader(pair: Pair, options: Namespace) -> tokenizer.Tokenizer:
    names = [field.name for field in fields(tokenizer.TokenizerConfig)]
    config = tokenizer.TokenizerConfig(**{name: getattr(options, name) for name in names})
    model = config.tokenizer_model or config.vocab_file
    reader = tokenizer.load_tokenizer(config)
    own = tokenizer.tokenizer_fingerprint(reader.ids())
    if (made_with := pair.sidecar.get("tokenizer_fingerprint", own)) != own:
        other = f"another tokenizer (fingerprint {made_with[:12]}) than --tokenizer-model {model}"
        print(f"\nWARNING: made with {other} ({own[:12]}): the text may not be what it was")
    return reader


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tool; a damaged dataset ends in one paragraph and exit status 2."""
    parser = tool_parser(__doc__, "inspect")
    add = parser.add_argument
    add("prefix", nargs="+", help="dataset without .bin or .idx")
    from_0 = partial(number, least=0)
    add("--documents", type=from_0, default=2, help="documents to show (default 2)")
    add("--seed", type=from_0, default=0, help="which ones, drawn at random (default 0)")
    add("--vocab-size", type=number, help="default: the sidecar's, or the tokenizer's")
    add("--checksum", action="store_true", help="print SHA-256 of the files")
    group = parser.add_argument_group("tokenizer", "with one documents are shown as text")
    add_tokenizer(group.add_argument)
    options = parser.parse_args(arguments)
    if arguments is None and not options.trust_remote_code:  # this process does nothing else
        tokenizer.without_models()
    for name in ("documents", "seed"):
        is_default = getattr(options, name) == parser.get_default(name)
        if not (is_default or options.tokenizer_model or options.vocab_file):
            parser.error(f"--{name} needs --tokenizer-model, by which ids become text")
    with mistakes_told(parser, (ValueError, OSError)):
        for prefix in options.prefix:
            _show(open_pair(prefix), options)
