"""Hit small LET runs with random faults, and compare what becomes of them with undisturbed runs.

    .venv/bin/python -m tests.chaos --faults 20 --seed 1 --output runs/chaos

Every fault has a run of its own, in turns over four layouts: a rank or all of them killed, TERM, a
rank paused or hung, a file of the newest checkpoint cut or a bit of it flipped, a full disk; at
start-up, in training or in a save. A second call with the same --output goes on.
"""

import argparse
import json
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_let.errors import UsageError
from megatron_let.report.table import markdown_table

# faults.py imports torch and Megatron, which --help does without.
if TYPE_CHECKING:
    from tests.chaos.faults import Outcome


def draw(count: int, seed: int) -> list[tuple[str, str, str]]:
    """Return fault, moment and layout of every case: the kinds of fault in turn, shuffled."""
    from tests.chaos.faults import FAULTS, LAYOUTS

    rng = random.Random(seed)
    kinds = list(FAULTS)
    faults = [kinds[i % len(kinds)] for i in range(count)]
    rng.shuffle(faults)
    layouts = [list(LAYOUTS)[i % len(LAYOUTS)] for i in range(count)]
    return [
        (fault, rng.choice(FAULTS[fault][1]), layout)
        for fault, layout in zip(faults, layouts, strict=True)
    ]


def table(outcomes: Sequence["Outcome"]) -> str:
    """Return a row for each fault."""
    header = ("fault", "in", "layout", "after step", "starts", "put aside", "same weights", "s")
    rows = [
        (
            o.fault,
            o.moment,
            o.layout,
            str(o.steps_before),
            str(o.starts),
            str(o.put_aside),
            "yes" if o.survived else "NO",
            f"{o.seconds:.0f}",
        )
        for o in outcomes
    ]
    return "\n".join(markdown_table(header, rows))


def run(output: Path, count: int, seed: int) -> list["Outcome"]:
    """Run what is missing; every outcome is kept as it comes."""
    from tests.chaos.faults import LAYOUTS, Outcome, befall, run_to_its_end
    from tests.support.tiny_run import Corpus, make_corpus

    corpus = Corpus(output / "corpus")
    if not (output / "corpus" / "complete").exists():
        shutil.rmtree(output / "corpus", ignore_errors=True)
        make_corpus(output / "corpus")
        (output / "corpus" / "complete").touch()
    kept = output / f"outcomes-{seed}.jsonl"
    lines = kept.read_text().splitlines() if kept.exists() else []
    outcomes = [Outcome(**json.loads(line)) for line in lines]
    for number, (fault, moment, layout) in enumerate(draw(count, seed)):
        if number < len(outcomes):
            continue
        whole = output / f"whole-{list(LAYOUTS).index(layout)}"
        if not (whole / "complete").exists():
            run_to_its_end(corpus, layout, whole)
            (whole / "complete").touch()
        save = output / f"fault-{seed}-{number}"
        shutil.rmtree(save, ignore_errors=True)  # of a call that was killed
        print(f"{number + 1} of {count}: {fault}, {moment}, {layout}", flush=True)
        outcomes.append(befall(corpus, layout, fault, moment, save, seed + number, whole))
        with kept.open("a") as file:
            file.write(json.dumps(asdict(outcomes[-1])) + "\n")
    return outcomes[:count]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tool; the exit status tells whether every run ended as it should."""
    parser = argparse.ArgumentParser(
        prog="tests.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--faults", type=int, default=20, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("runs/chaos"), metavar="DIR")
    options = parser.parse_args(arguments)
    try:
        if options.faults < 1:
            raise UsageError(f"--faults {options.faults} must be at least 1.")
        outcomes = run(options.output.absolute(), options.faults, options.seed)
    except (UsageError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    survived = sum(outcome.survived for outcome in outcomes)
    print(f"\n{table(outcomes)}\n\n{survived} of {len(outcomes)} end bit-identical.")
    sys.exit(survived != len(outcomes))


if __name__ == "__main__":
    main()
