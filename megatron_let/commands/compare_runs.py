"""Compare training runs by their metrics.jsonl: a table, and a picture.

    megatron-let compare runs/plain runs/let "LET, weight 3=runs/let3" --teacher runs/small

Every seed needs its plain run (--method baseline); the target is that run's final validation loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_let.commands import labelled, mistakes_told, tool_parser
from megatron_let.report.page import arguments_of, differing, write_page
from megatron_let.report.plot import plot_comparison
from megatron_let.report.runs import Run, read_run
from megatron_let.report.table import comparison_table, losses_table, markdown_table
from megatron_let.report.targets import Comparison, by_label, compare_all, regime_sentence

JUDGED_BY = (
    "valid_data_path", "per_split_data_args_path", "full_validation", "eval_iters",
    "tokenizer_model",
)  # fmt: skip
"""Arguments that say what a validation loss is of, and the hash of the training data does not."""


def compare_runs(comparisons: Sequence[Comparison], teacher: Run | None) -> str:
    """Return the tables and the sentence that names the regime."""
    parts = [comparison_table(comparisons, teacher), losses_table(comparisons)]
    judged = {f"{c.run.label}, seed {c.run.seed}": c.run for c in comparisons}
    parts += _differences("the seconds are of other machines. The runs", judged, ["world_size"])
    judged |= {} if teacher is None else {"teacher": teacher}
    parts += _differences("the losses are not of the same text. The runs", judged, JUDGED_BY)
    for label, group in by_label(comparisons).items():
        seeds = {f"seed {c.run.seed}": c.run for c in group}
        parts += _differences(f"the means of {label!r} are of runs that", seeds)
    if teacher is not None:
        parts.append(regime_sentence(comparisons[0].plain, teacher.final.loss))
    return "\n\n".join(parts)


def _differences(
    what: str, runs: Mapping[str, Run], names: Sequence[str] | None = None
) -> list[str]:
    """A warning with the arguments, of these names, in which some runs differ; none if in none."""
    known = [replace(run, label=label) for label, run in runs.items() if arguments_of(run)]
    header, *rows = differing(known)
    rows = [row for row in rows if names is None or row[0] in names]
    # A selection is of the order in which one seed draws the samples.
    rows = [row for row in rows if row[0] != "kd_selection" or "None" in row]
    return ["\n".join([f"WARNING: {what} differ in", *markdown_table(header, rows)])] * bool(rows)


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
        runs = [read_run(path, label=label) for label, path in map(labelled, options.runs)]
        teacher = read_run(options.teacher) if options.teacher else None
        compared = compare_all(runs)
        text = compare_runs(compared, teacher)
        print(text)
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(text + "\n")
        loss = teacher.final.loss if teacher else None
        if options.plot:
            print(f"\nPicture: {plot_comparison(compared, options.plot, teacher_loss=loss)}")
        if options.html:
            print(f"\nPage: {write_page(compared, options.html, text, loss)}")
