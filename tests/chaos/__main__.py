"""Hit small LET runs with random faults, and compare what becomes of them with undisturbed runs.

    .venv/bin/python -m tests.chaos --faults 50 --seed 1 --output runs/chaos

Every fault has a run of its own, in turns over the layouts: a rank or all of them killed, TERM, a
rank paused or hung, a file of the newest checkpoint cut or a bit of it flipped, a full disk; at
start-up, in training, in an evaluation, or at a point of a save, of a removal or of the sums. A
fault that finds nothing to hit is drawn again, and the third time it is a failure. A second call
with the same --output goes on. The exit status tells whether all struck and ended bit-identical.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_let.errors import UsageError
from megatron_let.report.table import markdown_table

if TYPE_CHECKING:  # it imports torch and Megatron, which --help does without
    from tests.chaos.faults import Outcome

ROOT = Path(__file__).resolve().parents[2]


def commits_seed() -> int:
    """A seed that nobody chose: of the commit's hash."""
    command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), "rev-parse", "HEAD"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout[:8], 16)


def draw(count: int, seed: int, with_tmpfs: bool = True) -> list[tuple[str, str, str]]:
    """Return fault, moment and layout of every case: the kinds of fault in turn, shuffled."""
    from tests.chaos.faults import FAULTS, LAYOUTS

    rng = random.Random(seed)
    kinds = [kind for kind in FAULTS if with_tmpfs or kind != "tmpfs full"]
    rng.shuffle(kinds)  # or few faults would always be the same ones
    faults = [kinds[i % len(kinds)] for i in range(count)]
    layouts = [list(LAYOUTS)[i % len(LAYOUTS)] for i in range(count)]
    rng.shuffle(layouts)
    return [
        (fault, rng.choice(FAULTS[fault][1]), layout)
        for fault, layout in zip(faults, layouts, strict=True)
    ]


def table(outcomes: Sequence["Outcome"]) -> str:
    """Return a row for each fault."""
    header = "fault|in|layout|after step|draws|starts|put aside|same state|s".split("|")
    rows = [
        (
            o.fault,
            o.moment,
            o.layout,
            str(o.steps_before) if o.struck else "MISSED",
            str(o.draws),
            str(o.starts),
            str(o.put_aside),
            "yes" if o.survived else f"NO {', '.join(o.differing)}",
            f"{o.seconds:.0f}",
        )
        for o in outcomes
    ]
    return "\n".join(markdown_table(header, rows))


def run(output: Path, count: int, seed: int) -> list["Outcome"]:
    """Run what is missing; every outcome is kept as it comes."""
    from tests import preloaded  # noqa: F401  # what all jobs are forked from
    from tests.chaos.faults import LAYOUTS, Outcome, befall, run_to_its_end
    from tests.support.disk import REASON, can_mount

    corpus = _corpus(output / "corpus")
    kept = output / f"outcomes-{seed}.jsonl"
    lines = kept.read_text().splitlines() if kept.exists() else []
    outcomes = [Outcome(**json.loads(line)) for line in lines]
    if not can_mount():
        print(f"no tmpfs full: {REASON}", flush=True)
    for number, (fault, moment, layout) in enumerate(draw(count, seed, can_mount())):
        if number < len(outcomes):
            continue
        whole = output / f"whole-{list(LAYOUTS).index(layout)}"
        if not (whole / "complete").exists():
            shutil.rmtree(whole, ignore_errors=True)
            run_to_its_end(corpus, layout, whole / "run", whole)
            (whole / "complete").touch()
        folder = output / f"fault-{seed}-{number}"
        print(f"{number + 1} of {count}: {fault}, {moment}, {layout}", flush=True)
        outcome = befall(corpus, layout, fault, moment, folder, seed + number, whole / "run")
        outcomes.append(outcome)
        if outcome.survived:
            shutil.rmtree(folder)
        with kept.open("a") as file:
            file.write(json.dumps(asdict(outcomes[-1])) + "\n")
    return outcomes[:count]


def _corpus(folder: Path):  # type: ignore[no-untyped-def]
    """Made in a fork: tokenizers start threads, and forks of this process need none."""
    from tests.support.tiny_run import Corpus, make_corpus

    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if (pid := os.fork()) == 0:
            make_corpus(folder)
            (folder / "complete").touch()
            os._exit(0)
        os.waitpid(pid, 0)
    return Corpus(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tool; the exit status tells whether every run ended as it should."""
    parser = argparse.ArgumentParser(
        prog="tests.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--faults", type=int, default=50, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, help="default: drawn from the commit's hash")
    parser.add_argument("--output", type=Path, default=Path("runs/chaos"), metavar="DIR")
    parser.add_argument(
        "--executed",
        action="store_true",
        help="execute every process, as a user does, where others are forked from one that has "
        "imported Megatron",
    )
    options = parser.parse_args(arguments)
    seed = commits_seed() if options.seed is None else options.seed
    print(f"--seed {seed}", flush=True)
    try:
        if options.faults < 1:
            raise UsageError(f"--faults {options.faults} must be at least 1.")
        if options.executed:
            from tests.chaos.jobs import Job

            Job.executed = True
        outcomes = run(options.output.absolute(), options.faults, seed)
    except (UsageError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    struck, survived = (sum(getattr(o, name) for o in outcomes) for name in ("struck", "survived"))
    print(f"\n{table(outcomes)}\n\nOf {len(outcomes)}, {struck} struck, {survived} end identical.")
    sys.exit(survived != len(outcomes))


if __name__ == "__main__":
    main()
