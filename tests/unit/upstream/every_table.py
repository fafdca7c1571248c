"""Looks up all that is replaced, in a process of its own: every_table [gone | twice], a fault."""

import sys
from argparse import Namespace
from collections import Counter
from pkgutil import resolve_name

from megatron_let.upstream import async_saves, cpu, dry, loop_hooks, mended, safe_loading

FAULTS = {"gone": [mended.REDIRECTS[0]._replace(name="gone")], "twice": mended.REDIRECTS}


def main() -> None:
    args = Namespace(
        fake_process_group=False, async_save=True, rank=0, async_ckpt_cpu_priority=1,
        async_ckpt_io_priority=1,
    )  # fmt: skip
    tables = {
        "cpu": cpu.TORCH_REDIRECTS + cpu.MEGATRON_REDIRECTS,
        "mended": mended.REDIRECTS,
        "safe_loading": safe_loading.REDIRECTS,
        "loading": safe_loading.redirects(None, None, None),
        "async_saves": async_saves.redirects(args, None),
        "loop_hooks": loop_hooks.LoopHooks(args).redirects(),
        **{name: FAULTS[name] for name in sys.argv[1:]},
    }
    every = [redirect for table in tables.values() for redirect in table]
    for redirect in every:
        getattr(resolve_name(redirect.owner), redirect.name)
        assert len(redirect.reason) > 2, redirect
    for redirect in dry.TORCH + dry.MEGATRON + dry.kernels(None):  # in the place of the CPU's
        getattr(resolve_name(redirect.owner), redirect.name)
    twice = [name for name, n in Counter(redirect[:2] for redirect in every).items() if n > 1]
    assert not twice, twice
    print({name: len(table) for name, table in tables.items()})


if __name__ == "__main__":
    main()
