"""Compare training runs by their metrics.jsonl: a table, and a picture.

    megatron-let compare runs/plain runs/let "LET, weight 3=runs/let3" --teacher runs/small

Every seed needs its plain run (--method baseline); the target is that run's final validation loss.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_let.commands import mistakes_told, tool_parser
from megatron_let.report.page import differing, write_page
from megatron_let.report.plot import plot_comparison
from megatron_let.report.runs import Run, read_run
from megatron_let.report.table import comparison_table, losses_table, markdown_table
from megatron_let.report.targets import compare_all, regime_sentence

JUDGED_BY = (
    "valid_data_path", "per_split_data_args_path", "full_validation", "eval_iters",
    "tokenizer_model",
)  # fmt: skip
"""Arguments that say what a validation loss is of, and the hash of the training data does not."""


def _read_labelled(word: str) -> Run:
    """Read the run of one `[LABEL=]FOLDER`; both may hold more of the sign."""
    parts = word.split("=")
    for at in range(len(parts)):
        if (folder := Path("=".join(parts[at:]))).exists():
            return read_run(folder, label="=".join(parts[:at]))
    return read_run(Path(word.partition("=")[2] or word))


def compare_runs(runs: Sequence[Run], teacher: Run | None) -> str:
    """Return the tables and the sentence that names the regime; raises as `compare_all`."""
    comparisons = compare_all(runs)
    parts = [comparison_table(comparisons, teacher), losses_table(comparisons)]
    judged = [replace(c.run, label=f"{c.run.label}, seed {c.run.seed}") for c in comparisons]
    judged += [replace(teacher, label="teacher")] if teacher is not None else []
    header, *rows = differing(judged)
    if rows := [row for row in rows if row[0] in JUDGED_BY]:
        warning = "WARNING: the losses are not of the same text. The runs differ in"
        parts.append("\n".join([warning, *markdown_table(header, rows)]))
    if teacher is not None:
        parts.append(regime_sentence(comparisons[0].plain, teacher.final.loss))
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tool; a mistake of the user ends in one paragraph and exit status 2."""
    parser = tool_parser(__doc__, "compare", allow_abbrev=False)
    add = parser.add_argument
    save = "a run's --save; runs of one label differ in their seeds (default label: the method)"
    add("runs", nargs="+", metavar="[LABEL=]FOLDER", help=save)
    add("--teacher", type=Path, metavar="FOLDER", help="the teacher's own training run")
    add("--output", type=Path, metavar="FILE", help="keep the tables there too")
    add("--plot", type=Path, metavar="PNG", help="draw the losses")
    add("--html", type=Path, metavar="FILE", help="write a page: curves over any axis, tables")
    options = parser.parse_args(arguments)
    with mistakes_told(parser, (ValueError, ImportError, OSError)):
        runs = [_read_labelled(word) for word in options.runs]
        teacher = read_run(options.teacher) if options.teacher else None
        text = compare_runs(runs, teacher)
        print(text)
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(text + "\n")
        loss = teacher.final.loss if teacher else None
        compared = compare_all(runs)
        if options.plot:
            print(f"\nPicture: {plot_comparison(compared, options.plot, teacher_loss=loss)}")
        if options.html:
            print(f"\nPage: {write_page(compared, options.html, text, loss)}")
