"""Select the training samples that SALT distils on (SALT_DS, arXiv 2410.18779).

    megatron-let select --scorer-model FOLDER_OR_ID --keep-fraction 0.5 \\
        --output selection.npz <the flags of the run that will use it: --method salt ...>
    megatron-let pretrain <the same flags> --kd-selection selection.npz

Scores the first samples of that run's training stream with a small model, best an early checkpoint
of the teacher, and keeps the hard ones that are within its reach: those whose tokens, where they
are among the model's ten likeliest, have the highest median loss. Without --scorer-model the
samples are chosen at random, as a control. With torchrun the processes share the work; an
interrupted call goes on where it stopped.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from megatron_let.commands import mistakes_told, number, parse_beside_run, tool_parser
from megatron_let.errors import UsageError

DTYPES = ("fp32", "bf16", "fp16")


def _build_parser() -> ArgumentParser:
    usage = "%(prog)s [options] <the flags of the run>"
    parser = tool_parser(__doc__, "select", usage=usage, allow_abbrev=False)
    add = parser.add_argument
    add("--scorer-model", metavar="FOLDER_OR_ID", help="default: none, at random")
    add("--keep-fraction", type=float, required=True, help="part of the scored samples to keep")
    add("--output", type=Path, required=True, metavar="FILE.npz")
    add("--top-k", type=number, default=10, help="tokens within the scorer's reach (default 10)")
    add("--scorer-dtype", dest="dtype", choices=DTYPES, default="fp32", help="default: fp32")
    add("--scorer-batch", dest="batch", type=number, default=8, help="samples at once (default 8)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tool; a mistake of the user ends in one paragraph and exit status 2."""
    parser = _build_parser()
    options, flags = parse_beside_run(parser, arguments)
    scoring = ("top_k", "dtype", "batch")
    is_given = [vars(options)[name] != parser.get_default(name) for name in scoring]
    if options.scorer_model is None and any(is_given):
        parser.error("--top-k, --scorer-dtype and --scorer-batch need --scorer-model. Add it.")

    from megatron_let.upstream import cpu

    # Before Megatron is imported, which reads torch.compile at import.
    cpu.activate_if_wanted(work="scoring")

    from megatron_let.console import quiet
    from megatron_let.data.selection import number_wanted
    from megatron_let.selection.run_data import build_datasets, parse_run
    from megatron_let.selection.scoring import SelectConfig, select

    with mistakes_told(parser, (UsageError, OSError)), quiet(flags):
        config = SelectConfig(**vars(options))
        args = parse_run(parser.prog, flags)
        number_wanted(args)
        selection = select(config, args, build_datasets(args)[0])
    if selection is None:  # not the first rank
        return
    if selection.beyond_reach:
        print(
            f"WARNING: {selection.beyond_reach} of the {len(selection.samples)} samples have less "
            "than a tenth of their tokens within the scorer's reach, and were chosen for lack of "
            "better ones. A better scorer, a larger --top-k or a smaller --keep-fraction helps."
        )
    print(
        f"Wrote {config.output}: {len(selection.samples)} of {selection.candidates} samples; "
        f"scoring took {selection.flops:.2e} FLOPs. Train with --kd-selection {config.output}"
    )
