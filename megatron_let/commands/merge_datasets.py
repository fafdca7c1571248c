"""Join all .bin/.idx pairs of a folder into one, in the order of their names.

megatron-let merge --input folder --output-prefix data/all_text_document
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from megatron_let import __version__
from megatron_let.commands import mistakes_told, tool_parser
from megatron_let.data.indexed import ENDINGS, check_absent, check_folder_of
from megatron_let.data.inspect import Pair, open_pair
from megatron_let.data.sources import file_identity
from megatron_let.errors import UsageError

_OTHER_TOKENIZER = "they were made with different tokenizers"
SAME = {
    "tokenizer_fingerprint": _OTHER_TOKENIZER,
    "vocab_size": _OTHER_TOKENIZER,
    "eod_id": "their documents end differently; make all with --append-eod, or none",
    "around_text": "one holds what the tokenizer puts around a text, such as BOS; make all with "
    "--tokenizer-hf-no-include-special-tokens, or none",
}
"""What the sidecars must agree on, and what it means where they do not."""
ADDED = ("documents", "empty_documents", "tokens", "text_bytes")


def _find_pairs(folder: Path) -> list[str]:
    """Prefixes of the pairs in `folder`, sorted; a link may lead to one that lies elsewhere."""
    if not folder.is_dir():
        raise ValueError(f"--input {folder} is no folder")
    halves = {suffix: {p.stem for p in folder.glob(f"*{suffix}")} for suffix in (".bin", ".idx")}
    for stem in sorted(halves[".bin"] ^ halves[".idx"]):
        raise ValueError(f"{folder / stem} has no {'.idx' if stem in halves['.bin'] else '.bin'}")
    if not halves[".bin"]:
        raise ValueError(f"--input {folder} holds no .bin/.idx pair")
    seen: dict[tuple[int, int], str] = {}
    for stem in sorted(halves[".bin"]):
        if (other := seen.setdefault(file_identity(f"{folder / stem}.bin"), stem)) != stem:
            raise ValueError(
                f"{folder / stem} is {other} by another name, and its documents would be there "
                "twice: take one of them away"
            )
    return [str(folder / stem) for stem in seen.values()]


def merge(prefixes: list[str], output: str) -> None:
    """Write the documents of all `prefixes`, in their order, to `output`.bin, .idx and .json.

    Nothing appears at the final paths before everything has succeeded. Raises ValueError if a pair
    is damaged, two do not go together, or the output exists.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    check_folder_of(output)
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
    first, names = pairs[0], {Path(pair.prefix).name for pair in pairs}
    for pair in pairs:
        for part in pair.sidecar.get("merged", ()):
            if Path(part).name in names:
                raise UsageError(
                    f"{pair.prefix} was merged from {part}, which is in its folder: its documents "
                    "would be there twice. Take one of them away."
                )
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
    if all("skipped" in pair.sidecar for pair in pairs):
        about["skipped"] = sum((Counter(pair.sidecar["skipped"]) for pair in pairs), Counter())
    return about | {"merged": [n for p in pairs for n in (p.prefix, *p.sidecar.get("merged", ()))]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tool; a mistake of the user ends in one paragraph and exit status 2."""
    parser = tool_parser(__doc__, "merge")
    parser.add_argument("--input", type=Path, required=True, help="folder of the pairs")
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX.bin, .idx and .json")
    options = parser.parse_args(arguments)
    with mistakes_told(parser, (ValueError, OSError)):
        prefixes = _find_pairs(options.input)
        merge(prefixes, options.output_prefix)
    print(f"Wrote {options.output_prefix}.bin, .idx and .json from {len(prefixes)} pairs")
