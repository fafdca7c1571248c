"""Which method wins, and on which axis? All of them on the same batches, in both regimes.

    .venv/bin/python examples/comparison/run.py [--seeds 3] [--fast]

Sizes, data, teachers and plain students are those of the quickstart, whose finished stages
are taken over. The main methods run with every seed, controls with the first. Every run is kept
under runs/quickstart; a second call goes on where the first one stopped.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_let.commands import convert_checkpoint  # noqa: E402
from megatron_let.commands.compare_runs import compare_runs  # noqa: E402
from megatron_let.quickstart.run import FAST, FULL, Quickstart, Recipe  # noqa: E402
from megatron_let.report.plot import plot_comparison  # noqa: E402
from megatron_let.report.runs import Run, read_run  # noqa: E402
from megatron_let.report.targets import compare_all  # noqa: E402

REGIMES = ("behind", "pass")
MAIN = ("let", "salt", "reverse-kd")
"""With every seed; the others with the first."""
KEEP_FRACTION = 0.75
"""A quickstart's run has few samples more than SALT sees in its first part."""


def variants(recipe: Recipe) -> dict[str, str]:
    """The flags of every guided student, by the name of its folder and in the report.

    SCORED and RANDOM stand for the files of the two selections.
    """
    let, kd = recipe.let_flags, recipe.kd_flags
    return {
        "let": f"--method let {let}",
        "salt": f"--method salt {kd}",
        "reverse-kd": f"--method reverse-kd {kd.split(' --kd-stop-step')[0]}",
        "let+salt": f"--method let+salt {let} {kd}",
        "salt, selected": f"--method salt {kd} --kd-selection SCORED",
        "let, random teacher": f"--method let {let} --teacher-control random",
        "let, shuffled states": f"--method let {let} --teacher-control shuffled",
        "salt, random teacher": f"--method salt {kd} --teacher-control random",
        "salt, random selection": f"--method salt {kd} --kd-selection RANDOM",
        "selected, no teacher": f"--method salt {kd} --kd-selection SCORED --teacher-control zero",
    }


class Comparison:
    """All students of one regime.

    Args:
        quickstart: data, teacher and plain students.
    """

    def __init__(self, quickstart: Quickstart) -> None:
        self.quickstart = quickstart
        self.teacher, self.exported = quickstart.teacher()
        # SALT_DS scores with an early checkpoint of the teacher.
        early = quickstart.teacher_model.steps // 2
        self._scorer = quickstart.results / "scorer-hf"
        if not self._scorer.exists():
            load = f"to-hf --load {quickstart.results / 'teacher'} --ckpt-step {early}"
            convert_checkpoint.main(f"{load} --output {self._scorer}".split())

    def student(self, name: str, flags: str, seed: int) -> Run:
        """Train one with these flags, or go on with it; its folder has that name."""
        flags += f" --teacher-model {self.exported}"
        for kind in ("SCORED", "RANDOM"):
            if kind in flags:
                flags = flags.replace(kind, str(self._selection(kind, seed)))
        folder = re.sub(r"[, ]+", "-", name)
        run = self.quickstart.guided(folder, seed, flags)
        return read_run(run.path, label=name)

    def _selection(self, kind: str, seed: int) -> Path:
        path = self.quickstart.results / f"selection-{kind.lower()}-{seed}.npz"
        if not path.exists():
            recipe = self.quickstart.recipe
            words = f"--method salt {recipe.kd_flags} --teacher-model {self.exported}"
            words += f" --keep-fraction {KEEP_FRACTION} --output {path}"
            words += f" --scorer-model {self._scorer}" * (kind == "SCORED")
            save = self.quickstart.results / "not-written"
            flags = self.quickstart.flags(recipe.student, save, seed, recipe.evaluations)
            tool = [sys.executable, str(ROOT / "tools" / "select_data.py")]
            subprocess.run([*tool, *words.split(), *flags], check=True, stdout=subprocess.DEVNULL)
        return path


def compare(quickstart: Quickstart, seeds: int) -> None:
    """Train what is missing of one regime, and write its report, anew after every seed."""
    comparison = Comparison(quickstart)
    runs: list[Run] = []
    for seed in range(1, seeds + 1):
        runs.append(quickstart.plain(seed))
        for name, flags in variants(quickstart.recipe).items():
            if seed == 1 or name in MAIN:
                print(f"{quickstart.results.name}: {name}, seed {seed}", flush=True)
                runs.append(comparison.student(name, flags, seed))
        report(quickstart, runs, comparison.teacher)


def report(quickstart: Quickstart, runs: list[Run], teacher: Run) -> None:
    """Print and keep the tables, draw the picture."""
    folder, warning = quickstart.results, quickstart.recipe.warning
    comparisons = compare_all(runs)
    text = f"{warning}\n\n" * bool(warning) + compare_runs(comparisons, teacher)
    (folder / "comparison.md").write_text(text + "\n")
    picture = folder / "comparison.png"
    title = f"{len(variants(FULL)) + 1} ways to train on the same batches"
    loss = teacher.final.loss
    plot_comparison(comparisons, picture, teacher_loss=loss, title=title)
    print(f"\n{text}\n\nPicture: {picture}\n", flush=True)


def build_parser(description: str) -> argparse.ArgumentParser:
    """Return the options that say which of the quickstart's runs are meant."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--fast", action="store_true", help="a short smoke of the same path")
    parser.add_argument("--processes", type=int, default=2, help="data-parallel processes")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "quickstart")
    return parser


def open_quickstart(options: argparse.Namespace, regime: str) -> Quickstart:
    """Return the quickstart that `build_parser`'s options name, with its data at hand."""
    folder = options.output / ("fast" if options.fast else "full")
    folder.mkdir(parents=True, exist_ok=True)
    quickstart = Quickstart(FAST if options.fast else FULL, folder, regime, options.processes)
    quickstart.data()
    return quickstart


def main() -> None:
    """Run all regimes."""
    parser = build_parser(__doc__.splitlines()[0])
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=REGIMES)
    parser.add_argument("--seeds", type=int, default=1, help="of the main methods (default 1)")
    options = parser.parse_args()
    for regime in options.regimes:
        compare(open_quickstart(options, regime), options.seeds)


if __name__ == "__main__":
    main()
