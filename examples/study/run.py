"""Where does a small teacher help at 20 tokens per parameter, and against growth? (docs/study.md)

    .venv/bin/python examples/study/run.py [--list] [--until MINUTES] [--only NAME] [--jobs 2]

Makes the runs that `table.py` declares, in that order, as far as they are not yet in the record
(docs/study/runs, committed). Checkpoints are under runs/study: stopped or killed, the same call
goes on where it was; on another machine it goes on with the runs that are not in the record.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from examples.study.study import Study  # noqa: E402
from examples.study.table import FAST, LARGER, STUDY  # noqa: E402
from examples.study.workers import Workers  # noqa: E402

RECORD = ROOT / "docs" / "study"
SIZES = {"full": (STUDY, RECORD), "larger": (LARGER, RECORD / "larger"), "fast": (FAST, None)}


def main() -> None:
    """Make the open runs, or list all."""
    options = _parse()
    torch.set_num_threads(1)  # of scoring and conversion; the runs' own is set for each
    size = "fast" if options.fast else "larger" if options.larger else "full"
    table, record = SIZES[size]
    folder = options.output / size
    study = Study(table, folder, options.record or record or folder / "record", options.gpu)
    if options.list:
        print(study.overview())
        return
    study.prepare()
    workers = Workers(study, options.only, options.until)
    workers.run(options.jobs)
    print(study.overview())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="say what is done and what is open")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="no other runs than these")
    parser.add_argument(
        "--until", type=float, metavar="MINUTES", help="stop by then; runs save and go on later"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--gpu", action="store_true", help="all on the first GPU, not on the CPU")
    parser.add_argument("--fast", action="store_true", help="a short smoke of the same path")
    parser.add_argument("--larger", action="store_true", help="a model 3.4 times as large: a GPU's")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--record", type=Path, help="default: docs/study")
    return parser.parse_args()


if __name__ == "__main__":
    main()
