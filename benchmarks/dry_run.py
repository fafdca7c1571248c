"""How near are dry runs to a GPU, and the plan to dry runs? Tables of peaks of memory.

    .venv/bin/python benchmarks/dry_run.py [--layouts 20]

1. Single ranks that `benchmarks/gpu.py` measured on a GPU, with its batches.
2. Every recipe with every method, at its own batch: `--dry-run` and `tools/plan.py` without its
   allowance. Required: within 10 %.
3. So many drawn layouts of the recipes' students: the same.

Some 45 dry runs of 10 to 60 s; no GPU, no weights, no network.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.recipes import default_teacher, planned, recipe_flags, without  # noqa: E402
from megatron_let.dry_run.start import Found, found_by  # noqa: E402
from megatron_let.methods.table import METHODS  # noqa: E402
from megatron_let.planning.memory import RUNTIME_BYTES  # noqa: E402

GIB = 2**30
WORLD = 32
SIZES = ("1.4b", "3b", "7b")
LIMIT = 0.10
MEASURED = {
    ("1.4b", 0, 512): {"baseline": 37.4, "let": 37.7, "salt": 37.8},
    ("7b", 0, 128): {"baseline": 33.7, "let": 36.1, "salt": 33.7},
    ("7b", 31, 128): {"baseline": 28.6, "let": 28.6, "salt": 31.1},
}
"""GiB by size, rank of 32 and batch: docs/benchmarks.md, "On a GPU" (H100, 2026-11-26 and 27)."""


def flags_of(size: str, method: str, *more: str) -> list[str]:
    """A recipe's flags, the further ones in the place of its own."""
    with tempfile.TemporaryDirectory() as folder:
        flags = recipe_flags(size, method, default_teacher(size), Path(folder))
    names = {word for word in more if word.startswith("--")}
    return [*without(flags, lambda flag: flag in names), *more]


def dry(flags: Sequence[str], ranks: str = "one-per-stage") -> list[Found]:
    """What ranks of a run of 32 GPUs hold."""
    own = f"--dry-run --dry-run-world-size {WORLD} --dry-run-ranks {ranks}".split()
    return found_by([*flags, *own])[0]


def measured() -> Iterator[str]:
    """Rows of ranks that a GPU has run."""
    for (size, rank, batch), peaks in MEASURED.items():
        for method, gpu in peaks.items():
            [found] = dry(flags_of(size, method, "--global-batch-size", str(batch)), str(rank))
            peak = found.peak / GIB
            yield f"| {size}, rank {rank} of {WORLD} | {method} | {gpu:.1f} | {peak:.1f} | " + (
                f"{peak / gpu - 1:+.1%} |"
            )


def compared(name: str, size: str, flags: list[str], recompute: str) -> tuple[str, float]:
    """A row of a run's fullest rank, by dry run and plan; and how far they are apart."""
    own = without(flags, lambda flag: flag.startswith("--recompute"))
    plan = planned(own, WORLD, default_teacher(size), "--recompute", recompute)
    found = dry(flags)
    peak = max(one.peak for one in found) / GIB
    paper = (max(stage.total for stage in plan.memory) - RUNTIME_BYTES) / GIB
    flops = sum(one.flops for one in found) / 1e12
    row = f"| {name} | {peak:.1f} | {paper:.1f} | {paper / peak - 1:+.1%} | {flops:,.0f} |"
    return row, paper / peak - 1


def recipes() -> Iterator[tuple[str, float]]:
    """Rows of every recipe with every method."""
    for size in SIZES:
        for method in METHODS:
            yield compared(f"{size} | {method}", size, flags_of(size, method), "none")


def drawn(number: int) -> Iterator[tuple[str, float]]:
    """Rows of layouts by the dice."""
    dice = random.Random(0)
    for _ in range(number):
        size, method = dice.choice(SIZES), dice.choice(list(METHODS))
        tp, pp, rows = dice.choice((1, 2, 4, 8)), dice.choice((1, 2, 4)), dice.choice((1, 2, 4))
        recompute = dice.choice(("none", "selective", "full"))
        micro = 2 * pp * dice.choice((1, 2))
        layout = f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp} "
        layout += f"--micro-batch-size {rows} --global-batch-size {micro * rows * 32 // (tp * pp)}"
        vpp = dice.choice((1, 2)) if pp > 1 else 1
        words = layout.split() + ["--sequence-parallel"] * (tp > 1)
        words += ["--num-virtual-stages-per-pipeline-rank", str(vpp)] * (vpp > 1)
        words += recomputation(recompute)
        gone = {"--sequence-parallel", "--num-virtual-stages-per-pipeline-rank"}
        flags = [*without(flags_of(size, method), lambda flag, gone=gone: flag in gone), *words]
        flags = last_ones(flags)
        name = f"{size} {method}, TP {tp} PP {pp} VPP {vpp}, {micro} x {rows} rows, {recompute}"
        yield compared(name, size, flags, recompute)


def recomputation(kind: str) -> list[str]:
    """Megatron's flags of it."""
    if kind == "full":
        words = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
        return words.split()
    return ["--recompute-granularity", "selective"] * (kind == "selective")


def last_ones(flags: list[str]) -> list[str]:
    """The flags with the last one of each name alone, as argparse reads them."""
    groups: list[list[str]] = []
    for word in flags:
        if word.startswith("--"):
            groups.append([])
        groups[-1].append(word)
    return [word for group in {group[0]: group for group in groups}.values() for word in group]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", type=int, default=20, help="drawn ones (default 20)")
    options = parser.parse_args()
    print("| rank | method | measured, GiB | dry run | |\n|---|---|--:|--:|--:|")
    for line in measured():
        print(line, flush=True)
    for title, rows in (
        ("recipe | method", recipes()),
        ("drawn layout", drawn(options.layouts)),
    ):
        rule = "|---" * (title.count("|") + 1) + "|--:" * 4
        print(f"\n| {title} | dry run, GiB | plan | off | TFLOP a step |\n{rule}|")
        worst = 0.0
        for line, apart in rows:
            worst = max(worst, abs(apart))
            print(line, flush=True)
        print(f"\nFarthest apart: {worst:.1%} (required: {LIMIT:.0%}).")


if __name__ == "__main__":
    main()
