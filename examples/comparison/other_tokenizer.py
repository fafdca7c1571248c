"""What is lost where the teacher has another tokenizer? Two equal teachers, one with the student's.

    .venv/bin/python examples/comparison/other_tokenizer.py [--seeds 3] [--fast]

The quickstart's data, teacher, plain and LET students; beside them a teacher of the same shape with
twice as many tokens, at the checkpoint whose bits per byte are nearest to the first one's: so the
second knows as much, and differs in its tokens. Every run is kept under runs/quickstart; a second
call goes on where the first one stopped.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.comparison.run import build_parser, open_quickstart  # noqa: E402
from examples.study.record import score_model  # noqa: E402
from megatron_let.commands import convert_checkpoint  # noqa: E402
from megatron_let.commands.compare_runs import compare_runs  # noqa: E402
from megatron_let.quickstart.run import Quickstart  # noqa: E402
from megatron_let.report.plot import plot_comparison  # noqa: E402
from megatron_let.report.runs import Run, read_run  # noqa: E402
from megatron_let.report.targets import compare_all  # noqa: E402

TIMES = 2
"""So many times as many tokens has the other tokenizer."""
LONGER = 1.5
"""So many times as many steps it takes, lest its last checkpoint be the worse teacher."""
SAVES = 30
"""Checkpoints to choose from."""


def other_teacher(quickstart: Quickstart, same: Path) -> tuple[Path, str]:
    """Return a teacher with another tokenizer that knows as much as `same`, and the two scores."""
    folder = quickstart.folder / "other-tokenizer"
    folder.mkdir(exist_ok=True)
    if not (folder / "corpus").exists():
        (folder / "corpus").symlink_to("../corpus")
    recipe = quickstart.recipe
    recipe = replace(recipe, vocab_size=TIMES * recipe.vocab_size, saves=SAVES)
    other = Quickstart(recipe, folder, "behind", quickstart.processes)
    other.data()
    model = other.teacher_model
    model = replace(model, steps=int(LONGER * model.steps))
    run = other.train(model, folder / "teacher", 1, SAVES, "--method baseline")
    texts = {"valid": quickstart.folder / "corpus" / "valid.jsonl"}

    def bits_per_byte(exported: Path) -> float:
        return score_model(exported, texts, recipe.seq_length)["valid"].bits_per_byte

    def score(step: int) -> tuple[float, Path]:
        exported = folder / f"teacher-{step}-hf"
        if not exported.exists():
            load = f"to-hf --load {folder / 'teacher'} --ckpt-step {step} --output {exported}"
            convert_checkpoint.main(load.split())
        return bits_per_byte(exported), exported

    wanted = bits_per_byte(same)
    last, _ = score(model.steps)
    per_nat = last / run.final.loss
    steps = range(model.steps // SAVES, model.steps + 1, model.steps // SAVES)
    losses = {e.iteration: e.loss * per_nat for e in run.evaluations if e.iteration in steps}
    near = sorted(losses, key=lambda step: abs(losses[step] - wanted))[:2]
    scored = [score(step) for step in near]
    found, exported = min(scored, key=lambda pair: abs(pair[0] - wanted))
    said = f"{found:.4f} bits per byte with the other tokenizer, {wanted:.4f} with the student's"
    return exported, f"Teachers: {said} ({100 * (found / wanted - 1):+.1f} %)."


def main() -> None:
    """Run all, and report after every seed."""
    parser = build_parser(__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="students of each kind (default 3)")
    options = parser.parse_args()
    quickstart = open_quickstart(options, "behind")
    teacher, same = quickstart.teacher()
    other, scores = other_teacher(quickstart, same)
    let = f"--method let {quickstart.recipe.let_flags} --teacher-model"
    runs: list[Run] = []
    for seed in range(1, options.seeds + 1):
        print(f"seed {seed}", flush=True)
        runs.append(quickstart.plain(seed))
        runs.append(quickstart.guided("let", seed, f"{let} {same}"))
        run = quickstart.guided("let-other-tokenizer", seed, f"{let} {other}")
        runs.append(read_run(run.path, label="LET, other tokenizer"))
        report(quickstart, runs, teacher, scores)


def report(quickstart: Quickstart, runs: list[Run], teacher: Run, scores: str) -> None:
    """Print and keep the table and what is kept of the gain; draw the picture."""
    plain, same, other = (runs[i::3] for i in range(3))
    gains = [
        sum(p.final.loss - r.final.loss for p, r in zip(plain, arm, strict=True))
        for arm in (same, other)
    ]
    kept = f"Of the gain in the last loss {100 * gains[1] / gains[0]:.0f} % is kept."
    warning, comparisons = quickstart.recipe.warning, compare_all(runs)
    text = "\n\n".join(
        [*([warning] if warning else []), compare_runs(comparisons, teacher), f"{scores} {kept}"]
    )
    (quickstart.results / "other-tokenizer.md").write_text(text + "\n")
    picture = quickstart.results / "other-tokenizer.png"
    loss = teacher.final.loss
    title = "A teacher with the student's tokenizer, and one with another"
    plot_comparison(comparisons, picture, teacher_loss=loss, title=title)
    print(f"\n{text}\n\nPicture: {picture}\n", flush=True)


if __name__ == "__main__":
    main()
