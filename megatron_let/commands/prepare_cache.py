"""Build the index caches of a run's datasets ahead, on one node and without its GPUs.

    megatron-let cache <the flags of the run, with --data-cache-path>

The run's ranks then find them instead of waiting while the first one builds.
"""

from collections.abc import Sequence

from megatron_let.commands import mistakes_told, parse_beside_run, tool_parser
from megatron_let.errors import UsageError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tool; a mistake of the user ends in one paragraph and exit status 2."""
    parser = tool_parser(__doc__, "cache", usage="%(prog)s <the flags of the run>")
    _, flags = parse_beside_run(parser, arguments)

    from megatron_let.upstream import cpu

    cpu.activate()  # before Megatron is imported, which reads torch.compile at import

    from megatron_let.console import quiet
    from megatron_let.selection.run_data import build_datasets, parse_run

    with mistakes_told(parser, (UsageError, OSError)), quiet(flags):
        args = parse_run(parser.prog, flags)
        if args.data_cache_path is None or args.mock_data:
            raise UsageError("Add --data-cache-path, where caches are put; mock data have none.")
        if "--global-batch-size" not in " ".join(flags):
            raise UsageError("Add --global-batch-size: how many samples a run takes depends on it.")
        datasets = build_datasets(args)
    for name, dataset in zip(("train", "validation", "test"), datasets, strict=True):
        several = dataset if isinstance(dataset, list) else [dataset]
        sizes = ", ".join(f"{len(one):,}" for one in several if one is not None)
        print(f"{name}: {sizes or 'none'}{' samples' * bool(sizes)}")
    print(f"Caches are in {args.data_cache_path}")
