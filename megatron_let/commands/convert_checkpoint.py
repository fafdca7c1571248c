"""Convert checkpoints between Megatron and Hugging Face, or grow one; on CPU, a layer at a time."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_let.commands import mistakes_told, tool_parser
from megatron_let.errors import UsageError
from megatron_let.methods.table import import_file
from megatron_let.planning.shapes import SIZES

# The conversion imports torch and transformers, which --help does without.
DTYPES = ("fp32", "bf16", "fp16")


def _build_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__, "convert", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    add_parser = partial(commands.add_parser, allow_abbrev=False)
    to_hf = add_parser("to-hf", help="Megatron's torch_dist to a Hugging Face folder")
    to_hf.add_argument("--load", type=Path, required=True, metavar="DIR", help="the run's --save")
    to_hf.add_argument("--ckpt-step", type=int, metavar="N", help="iteration (default: latest)")
    tokenizer = "folder or hub id (default: the run's own)"
    to_hf.add_argument("--tokenizer-model", metavar="FOLDER", help=tokenizer)
    after = "load the result and print how it goes on after this"
    to_hf.add_argument("--sample", metavar="PROMPT", help=after)
    from_hf = add_parser("from-hf", help="a Hugging Face model to Megatron's torch_dist")
    larger = "a small Hugging Face model into a larger shape, to start a run from"
    grow = add_parser("grow", help=larger)
    _add_growth_flags(grow)
    for command in (from_hf, grow):
        command.add_argument("--hf-model", required=True, metavar="FOLDER", help="folder or hub id")
        command.add_argument("--revision", help="branch, tag or commit on the hub")
    default = "default: %(default)s"
    for command in (to_hf, grow):
        command.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help=default)
    for command in (to_hf, from_hf, grow):
        new = "new folder to write"
        command.add_argument("--output", type=Path, required=True, metavar="DIR", help=new)
        kept = "fp32" if command is grow else "as saved"
        command.add_argument("--dtype", choices=DTYPES, help=f"default: {kept}")
    for command in (to_hf, from_hf):
        own = "Python file with an architecture of your own (docs/extending.md)"
        command.add_argument("--family-module", metavar="FILE", help=own)
        logits = "compare both models' logits on a text"
        command.add_argument("--verify", action="store_true", help=logits)
    return parser


HOW = {
    "width": ("pad", "clone"),
    "depth": ("identity", "stack", "interleave"),
    "symmetry": ("none", "noise", "next-layer"),
}


def _add_growth_flags(parser: argparse.ArgumentParser) -> None:
    """The large model's sizes, by Megatron's names, and how the small one fills them."""
    for name in SIZES:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, metavar="N", help="default: the small model's")
    parser.add_argument("--untie-embeddings-and-output-weights", action="store_true")
    for name, choices in HOW.items():
        parser.add_argument(f"--{name}", choices=choices, default=choices[0])
    parser.add_argument("--seed", type=int, default=0, help="of what is random (default: 0)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="tell the losses on it")


def _to_hf(values: dict[str, Any]) -> None:
    """Export; then what was asked for besides."""
    from megatron_let.checkpoint.folder import differing, find_checkpoint, step_of
    from megatron_let.conversion.to_hf import export, sample
    from megatron_let.conversion.verify import verify

    prompt, check = values.pop("sample"), values.pop("verify")
    # A run that goes on training must not move on between the export and what follows.
    step = find_checkpoint(values["load"], values["ckpt_step"])
    if step.name != "release":
        values["ckpt_step"] = step_of(step)
    if problem := differing(step):  # --verify would read the same damage on both sides
        raise UsageError(f"{step} is damaged: {problem}. Choose another with --ckpt-step.")
    folder = export(**values)
    print(f"Wrote {folder}, of {step}", flush=True)  # not of a newer one that is cut
    if check:
        print(f"Verified: {verify(step, folder)}", flush=True)
    if prompt is not None:
        print(sample(folder, prompt))


def _from_hf(values: dict[str, Any]) -> None:
    """Import; then what was asked for besides."""
    from megatron_let.checkpoint.folder import find_checkpoint
    from megatron_let.conversion.from_hf import FLAGS_FILE, import_model, local_folder
    from megatron_let.conversion.verify import verify

    check = values.pop("verify")
    folder = import_model(**values)
    print(f"Wrote {folder}; the flags of a run that starts from it:\n", flush=True)
    print((folder / FLAGS_FILE).read_text(), flush=True)
    if check:
        source = local_folder(values["hf_model"], values["revision"])
        print(f"Verified: {verify(find_checkpoint(folder), source)}")


def _grow(values: dict[str, Any]) -> None:
    """Grow, and say what came out."""
    from megatron_let.conversion.grow import grow_model
    from megatron_let.conversion.growth import Growth

    sizes = {name: values.pop(name) for name in SIZES}
    sizes["tied"] = not values.pop("untie_embeddings_and_output_weights")
    how = {name: values.pop(name) for name in (*HOW, "seed")}
    verdict = grow_model(**values, sizes=sizes, growth=Growth(**how))
    print(f"Wrote {values['output']}\nVerified: {verdict}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tool; a mistake of the user ends in one paragraph and exit status 2."""
    parser = _build_parser()
    values = vars(parser.parse_args(arguments))
    commands = {"to-hf": _to_hf, "from-hf": _from_hf, "grow": _grow}
    command = commands[values.pop("command")]
    with mistakes_told(parser, (UsageError, OSError)):
        if (path := values.pop("family_module", None)) is not None:
            import_file("--family-module", path)
        command(values)
