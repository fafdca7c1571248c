"""Join .bin/.idx pairs into one."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from megatron_let import __version__
from megatron_let.data.indexed import ENDINGS, check_absent
from megatron_let.data.inspect import Pair, open_pair
from megatron_let.errors import UsageError

_OTHER_TOKENIZER = "they were made with different tokenizers"
SAME = {
    "tokenizer_fingerprint": _OTHER_TOKENIZER,
    "vocab_size": _OTHER_TOKENIZER,
    "eod_id": "their documents end differently; make all with --append-eod, or none",
}
"""What the sidecars must agree on, and what it means where they do not."""
ADDED = ("documents", "empty_documents", "tokens", "text_bytes")


def merge(prefixes: list[str], output: str) -> None:
    """Write the documents of all `prefixes`, in their order, to `output`.bin, .idx and .json.

    Nothing appears at the final paths before everything has succeeded. Raises ValueError if a pair
    is damaged, two do not go together, or the output exists.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    check_absent(output + ending for ending in ENDINGS)
    pairs = [open_pair(prefix) for prefix in prefixes]
    _check_together(pairs)
    with TemporaryDirectory(dir=Path(output).parent) as folder:
        partial = os.path.join(folder, "all")
        builder = IndexedDatasetBuilder(f"{partial}.bin", dtype=pairs[0].dtype.type)
        for prefix in prefixes:
            builder.add_index(prefix)
        builder.finalize(f"{partial}.idx")
        Path(f"{partial}.json").write_text(json.dumps(_sidecar(pairs), indent=2))
        for ending in ENDINGS:
            os.rename(partial + ending, output + ending)


def _check_together(pairs: list[Pair]) -> None:
    first = pairs[0]
    for pair in pairs[1:]:
        if pair.dtype != first.dtype:
            raise ValueError(
                f"{pair.prefix} holds {pair.dtype.name} and {first.prefix} {first.dtype.name}: "
                "they were made with tokenizers of different sizes"
            )
        for key in SAME:
            ours, theirs = pair.sidecar.get(key), first.sidecar.get(key)
            if ours != theirs and key in pair.sidecar and key in first.sidecar:
                raise UsageError(
                    f"{pair.prefix} has {key} {ours} and {first.prefix} {theirs}: {SAME[key]}"
                )


def _sidecar(pairs: list[Pair]) -> dict[str, object]:
    """What the sidecars have in common, and their sums; a pair without one says nothing."""
    about: dict[str, object] = {"tool_version": __version__}
    known = [key for key in (*SAME, *ADDED) if all(key in pair.sidecar for pair in pairs)]
    about |= {key: pairs[0].sidecar[key] for key in SAME if key in known}
    about |= {key: sum(pair.sidecar[key] for pair in pairs) for key in ADDED if key in known}
    return about | {"merged": [pair.prefix for pair in pairs]}
