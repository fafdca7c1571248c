"""Join all .bin/.idx pairs of a folder into one, in the order of their names.

megatron-let merge --input folder --output-prefix data/all_text_document
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_let.commands import mistakes_told, tool_parser
from megatron_let.data.merge import merge
from megatron_let.data.sources import file_identity


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
