"""A public model with a tokenizer of its own guides a student: plain training against LET.

    .venv/bin/python examples/real_teacher/run.py [--seeds 1] [--fast]

The student, its tokenizer (1,024 tokens) and its text are the study's: 20 tokens a parameter of
Python from pinned wheels. The teacher is SmolLM2-135M-Instruct, 49,152 tokens, from a wheel of PyPI
(93 MB), in bf16. It guides the first quarter of the steps, which is most of the time: about an
hour on two cores. Every run is kept under runs/real_teacher; a second call goes on where the first
one stopped.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.study.record import Score, score_model  # noqa: E402
from examples.study.table import FAST, STUDY  # noqa: E402
from megatron_let.commands.compare_runs import compare_runs  # noqa: E402
from megatron_let.quickstart.run import Quickstart, need  # noqa: E402
from megatron_let.quickstart.wheels import fetch_wheels  # noqa: E402
from megatron_let.report.plot import plot_comparison  # noqa: E402
from megatron_let.report.runs import Run, read_run  # noqa: E402
from megatron_let.report.targets import compare_all  # noqa: E402

WHEEL = Path(__file__).with_name("smollm2.txt")
LABEL = "LET, SmolLM2-135M"
LET = "--let-layer 1 --let-weight 3 --teacher-dtype bf16 --let-stop-step"
RATE = 8e-3
"""LET's best peak learning rate in the study, with a teacher of its own; plain training's is the
recipe's."""


def teacher_file() -> Path:
    """Fetch the model."""
    [folder] = fetch_wheels(WHEEL, endings=(".gguf",))
    [model] = folder.rglob("*.gguf")
    return model


def main() -> None:
    """Run all, and report after every seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a short smoke of the same path")
    parser.add_argument("--seeds", type=int, default=1, help="students of each kind (default 1)")
    parser.add_argument("--processes", type=int, default=2, help="data-parallel processes")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "real_teacher")
    options = parser.parse_args()
    need("gguf", "gguf")
    need("plot", "matplotlib")
    recipe = (FAST if options.fast else STUDY).recipe
    folder = options.output / ("fast" if options.fast else "full")
    folder.mkdir(parents=True, exist_ok=True)
    quickstart = Quickstart(recipe, folder, "small", options.processes)
    quickstart.data()
    student = quickstart.recipe.student
    stop = student.steps // 4
    guided = f"--method let --teacher-model {teacher_file()} {LET} {stop}"
    runs: list[Run] = []
    scores: dict[str, list[Score]] = {"plain": [], LABEL: []}
    for seed in range(1, options.seeds + 1):
        print(f"seed {seed}", flush=True)
        for name, label, rate, flags in (
            ("plain", "plain", student.lr, "--method baseline"),
            ("smollm2", LABEL, RATE, guided),
        ):
            save = folder / f"{name}-{seed}"
            model = replace(student, lr=rate)
            quickstart.train(model, save, seed, recipe.evaluations, flags)
            runs.append(read_run(save, label=label))
            exported = quickstart.export(save, folder / f"{name}-{seed}-hf")
            text = {"valid": folder / "corpus" / "valid.jsonl"}
            scores[label].append(score_model(exported, text, recipe.seq_length)["valid"])
        report(folder, runs, scores)


def report(folder: Path, runs: list[Run], scores: dict[str, list[Score]]) -> None:
    """Print and keep the tables, draw the picture."""
    bits = [
        f"{label} {', '.join(f'{score.bits_per_byte:.4f}' for score in found)}"
        for label, found in scores.items()
    ]
    key = "let guided share"
    shares = [record[key] for run in runs for record in run.train if key in record]
    comparisons = compare_all(runs)
    text = "\n\n".join(
        [
            compare_runs(comparisons, None),
            f"Bits per byte of the validation text: {'; '.join(bits)}.",
            f"{100 * sum(shares) / len(shares):.1f} % of the tokens had a target.",
        ]
    )
    (folder / "report.md").write_text(text + "\n")
    picture = folder / "report.png"
    plot_comparison(comparisons, picture, title="A student guided by SmolLM2-135M")
    print(f"\n{text}\n\nPicture: {picture}\n", flush=True)


if __name__ == "__main__":
    main()
