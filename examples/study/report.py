"""Make docs/study.md's tables and pictures, and README's first, from the record of the runs.

    .venv/bin/python examples/study/report.py [--check]

What stands between `<!-- table NAME -->` and `<!-- end -->` is replaced; the text around is written
by hand. `--check` changes nothing and fails if a table is not what the record says, or if a decimal
number in what is said of the results stands in no table.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.study.results import Result, Results  # noqa: E402
from examples.study.run import RECORD  # noqa: E402
from examples.study.study import Study  # noqa: E402
from examples.study.table import AUTO, LARGER, MEET, PLAIN, STUDY, Arm  # noqa: E402
from megatron_let.report.plot import plot_comparison  # noqa: E402
from megatron_let.report.table import markdown_table, spread  # noqa: E402

PAGE, README = ROOT / "docs" / "study.md", ROOT / "README.md"
BLOCK = re.compile(r"(?<=<!-- table )(\S+) -->\n(.*?)(?=<!-- end -->)", re.DOTALL)
RESULTS = "## Results"
DECIMAL = re.compile(r"\d+\.\d+")
NONE = "-"
OWN = "FLOPs + teacher's own"
MAIN = ("arm", "rate", "setting", "seeds", "final loss", "steps", "FLOPs", OWN)
Rows = list[tuple[str, ...]]


# --- tables -------------------------------------------------------------------------------------


def models(results: Results) -> list[str]:
    """The student and its teachers, as declared."""
    recipe = results.table.recipe
    rows: Rows = []
    student = recipe.student.parameters(recipe.vocab_size)
    for name, model in {"student": recipe.student, **recipe.teachers}.items():
        shape = f"{model.layers} x {model.hidden}, {model.heads} heads, FFN {model.ffn}"
        count = model.parameters(recipe.vocab_size)
        inner = model.parameters(0)
        tokens = model.steps * recipe.batch * recipe.seq_length
        numbers = (f"{count:,}", f"{inner:,}", f"{tokens / 1e6:.1f} M", f"{tokens / count:.0f}")
        rows.append((name, shape, *numbers, f"{tokens / inner:.0f}", f"{student / count:.1f}"))
    header = ("model", "shape", "parameters", "without embeddings", "tokens", "a parameter")
    return markdown_table((*header, "without embeddings", "student over it"), rows)


def meet(results: Results) -> list[str]:
    """The main table: every arm as it was tuned, over the seeds."""
    return markdown_table(MAIN, _main_rows(results))


def headline(results: Results) -> list[str]:
    """The first table of the README: that one without rate and setting."""
    rows = [(arm, *rest) for arm, _, _, *rest in _main_rows(results)]
    return markdown_table((MAIN[0], *MAIN[3:]), rows)


def _main_rows(results: Results) -> Rows:
    return [_main_row(arm, found) for arm in results.arms if (found := results.seeds(arm))]


def _main_row(arm: Arm, found: list[Result]) -> tuple[str, ...]:
    facts = found[0].summary.facts
    costs = zip(*((r.steps, r.flops, r.flops_with_teacher) for r in found), strict=True)
    shown = ("1.00",) * 3 if arm.name == PLAIN.name else [spread(c, 2) for c in costs]
    return (
        arm.label,
        f"{facts['rate']:.2g}",
        facts["setting"] if facts["depth"] in (None, facts["setting"]) else _with_depth(facts),
        str(len(found)),
        spread([result.summary.loss for result in found], 3),
        *shown,
    )


def scores(results: Results) -> list[str]:
    """The same runs by other measures, and seed 1 at plain training's rate."""
    rows: Rows = []
    for arm in results.arms:
        if found := results.seeds(arm):
            texts = [
                spread([result.summary.scores[text].bits_per_byte for result in found], 3)
                for text in ("valid", "documentation")
            ]
            beside = results.at_plain_rate(arm)
            rows.append((arm.label, *texts, f"{beside.summary.loss:.3f}" if beside else NONE))
    return markdown_table(("arm", "bits per byte", "other domain", "at plain's rate"), rows)


def _with_depth(facts: dict[str, str]) -> str:
    return f"{facts['depth']}, {facts['setting']}"


def by_seed(results: Results) -> list[str]:
    """Each seed's own steps: how hard its target is differs."""
    rows_of = [found for arm in results.arms[1:] if (found := results.seeds(arm))]
    plain = results.seeds(results.arms[0])
    passed = results.passed((results.chosen(MEET) or {"loss": 0.0})["loss"])
    header = (
        "seed",
        "plain's end",
        "passes the teacher",
        *(f[0].planned.arm.label for f in rows_of),
    )
    rows: Rows = []
    for result, when in zip(plain, passed, strict=True):
        seed = result.planned.seed
        same = [[r.steps for r in found if r.planned.seed == seed] for found in rows_of]
        ends = (str(seed), f"{result.summary.loss:.3f}", spread([when], 2))
        rows.append((*ends, *(spread(steps, 2) if steps else NONE for steps in same)))
    return markdown_table(header, rows)


def tuning(results: Results) -> list[str]:
    """Every tuning run; the best of each arm is marked."""
    best = {found[0].planned.name for arm in results.arms if (found := results.seeds(arm))}
    rows: Rows = []
    for result in results.group("tuning"):
        facts = result.summary.facts
        name = f"**{facts['label']}**" if facts["name"] in best else facts["label"]
        loss = f"{result.summary.loss:.3f}"
        rows.append(
            (name, f"{facts['rate']:.2g}", facts["setting"], loss, spread([result.steps], 2))
        )
    return markdown_table(("arm", "rate", "setting", "final loss", "steps"), rows)


def regimes(results: Results) -> list[str]:
    """The teacher of each regime, and when the plain runs pass it."""
    header = ("regime", "teacher", "step", "tokens per parameter", "loss", "passed after")
    rows: Rows = []
    recipe = results.table.recipe
    for regime in results.table.regimes:
        if chosen := results.chosen(regime):
            size = chosen["teacher"].removeprefix("teacher-")
            parameters = recipe.teachers[size].parameters(recipe.vocab_size)
            passed = spread(results.passed(chosen["loss"]), 2)
            numbers = (f"{chosen['tokens'] / parameters:.0f}", f"{chosen['loss']:.3f}", passed)
            rows.append((regime, size, str(chosen["iteration"]), *numbers))
    return markdown_table(header, rows)


def elsewhere(results: Results) -> list[str]:
    """The other regimes and the controls: seed 1, at plain training's rate."""
    run = ("regime or control", "arm", "setting", "final loss", "other domain")
    header = (*run, "steps", "FLOPs", OWN)
    rows: Rows = []
    for result in (*results.group("regimes"), *results.group("controls")):
        planned, facts = result.planned, result.summary.facts
        documentation = result.summary.scores["documentation"].bits_per_byte
        costs = (result.steps, result.flops, result.flops_with_teacher)
        shown = (spread([cost], 2) for cost in costs)
        losses = (f"{result.summary.loss:.3f}", f"{documentation:.3f}")
        where = planned.regime if planned.control is None else f"control: {planned.control}"
        rows.append((where, facts["label"], facts["setting"], *losses, *shown))
    return markdown_table(header, rows)


def costs(results: Results) -> list[str]:
    """Seconds within one machine, memory, and FLOPs of a whole run."""
    header = ("arm", "machine", "runs", "seconds", "memory, MiB", "FLOPs over plain's")
    groups: dict[tuple[str, str], list[Result]] = {}
    for arm in results.arms:
        for result in results.seeds(arm):
            machine = result.summary.facts["machine"]["id"]
            groups.setdefault((arm.label, machine), []).append(result)
    rows: Rows = []
    for (label, machine), found in groups.items():
        ends = [result.summary.run.final for result in found]
        seconds, memory = fmean(e.seconds for e in ends), max(e.peak_memory or 0 for e in ends)
        flops = fmean(r.summary.run.final.flops / r.comparison.plain_total.flops for r in found)
        numbers = (f"{seconds:.0f}", f"{memory / 2**20:.0f}", f"{flops:.2f}")
        rows.append((label, machine, str(len(found)), *numbers))
    return markdown_table(header, rows)


def auto(results: Results) -> list[str]:
    """Guidance that sets itself, beside the tuned arm of the same method, regime and seed."""
    header = ("regime", "arm", "seed", "final loss", "tuned by hand", "plain", "gain kept")
    cells: dict[tuple[str, str], dict[str, tuple[float, ...]]] = {}
    for result in results.group("auto"):
        planned, tuned = result.planned, results.tuned_beside(result.planned)
        if tuned is not None:
            plain = tuned.comparison.plain.final.loss
            losses = result.summary.loss, tuned.summary.loss, plain
            cells.setdefault((planned.regime, planned.arm.label), {})[str(planned.seed)] = losses
    rows: Rows = []
    for cell, seeds in cells.items():
        means = tuple(map(fmean, zip(*seeds.values(), strict=True)))
        for seed, losses in (seeds | ({"mean": means} if len(seeds) > 1 else {})).items():
            own, hand, plain = losses
            kept = (plain - own) / (plain - hand)
            rows.append((*cell, seed, *(f"{loss:.3f}" for loss in losses), f"{kept:.2f}"))
    return markdown_table(header, rows)


def widths(results: Results) -> list[str]:
    """How the teacher's width is met: interpolation first, each arm's seeds and their mean."""
    interpolated = AUTO[0][1]
    found = [r for r in results.group("auto") if r.planned.arm == interpolated]
    cells: dict[tuple[str, str], list[Result]] = {}
    for result in (*found, *results.group("widths")):
        planned = result.planned
        cells.setdefault((planned.regime, planned.arm.label), []).append(result)
    rows: Rows = []
    for cell, runs in sorted(cells.items(), key=lambda item: item[0][0] != MEET):
        measures = [
            (r.summary.loss, r.summary.scores["documentation"].bits_per_byte, r.steps, r.flops)
            for r in runs
        ]
        seeds = [str(r.planned.seed) for r in runs]
        if len(runs) > 1:
            columns = zip(*measures, strict=True)
            measures.append(tuple(None if None in column else fmean(column) for column in columns))
            seeds.append("mean")
        for seed, (loss, other, *costs) in zip(seeds, measures, strict=True):
            shown = (spread([cost], 2) for cost in costs)
            rows.append((*cell, seed, f"{loss:.3f}", f"{other:.3f}", *shown))
    header = ("regime", "arm", "seed", "final loss", "other domain", "steps", "FLOPs")
    return markdown_table(header, rows)


def again(results: Results) -> list[str]:
    """The runs that had been made before on a CPU, from other weights but for the grown ones."""
    rows: Rows = []
    for name, before in results.beside(results.table, "cpu").done.items():
        if (now := results.done.get(name)) is not None:
            pair = (before, now)
            rates = (f"{result.summary.facts['rate']:.2g}" for result in pair)
            losses = (f"{result.summary.loss:.3f}" for result in pair)
            steps = (spread([result.steps], 2) for result in pair)
            settings = dict.fromkeys(result.summary.facts["setting"] for result in pair)
            label = now.summary.facts["label"]
            rows.append((label, ", ".join(settings), *rates, *losses, *steps))
    names = (
        f"{what}, {where}" for what in ("rate", "final loss", "steps") for where in ("CPU", "GPU")
    )
    return markdown_table(("arm", "setting", *names), rows)


def progress(results: Results) -> list[str]:
    """How many of the declared runs are done."""
    rows = [(group, str(done), str(all_)) for group, (done, all_) in results.counts().items()]
    return markdown_table(("runs", "done", "declared"), rows)


TABLES: dict[str, Callable[[Results], list[str]]] = {
    table.__name__: table
    for table in (
        headline,
        models,
        meet,
        scores,
        tuning,
        regimes,
        elsewhere,
        auto,
        again,
        costs,
        progress,
    )
} | {
    "by-seed": by_seed,
    "elsewhere-cpu": lambda results: elsewhere(results.beside(STUDY, "cpu")),
    "auto-cpu": lambda results: auto(results.beside(STUDY, "cpu")),
    "widths-cpu": lambda results: widths(results.beside(STUDY, "cpu")),
    "larger": lambda results: meet(results.beside(LARGER, "larger")),
    "larger-scores": lambda results: scores(results.beside(LARGER, "larger")),
    "auto-larger": lambda results: auto(results.beside(LARGER, "larger")),
}


# --- the page -----------------------------------------------------------------------------------


def fill(page: str, results: Results) -> str:
    """Return the page with every table made anew. KeyError if there is no table of that name."""

    def block(match: re.Match[str]) -> str:
        return "\n".join([f"{match[1]} -->", *TABLES[match[1]](results), ""])

    return BLOCK.sub(block, page)


def unfounded(page: str) -> list[str]:
    """The decimal numbers behind `RESULTS` that stand neither in a table nor before it."""
    design, _, said = page.partition(RESULTS)
    tables = [match[2] for match in BLOCK.finditer(page)]
    known = set(DECIMAL.findall("\n".join([design, *tables])))
    return [number for number in DECIMAL.findall(BLOCK.sub("", said)) if number not in known]


def draw(results: Results, folder: Path) -> None:
    """Draw each regime that has runs: validation loss over steps."""
    plain, *guides = results.arms
    found = {MEET: [result for arm in (plain, *guides) for result in results.seeds(arm)]}
    for result in results.group("regimes"):
        first = found.setdefault(result.planned.regime, results.seeds(plain)[:1])
        first.append(result)
    for regime, runs in found.items():
        chosen = results.chosen(regime)
        if chosen and len(runs) > 1:
            comparisons = [result.comparison for result in runs]
            title = f"{regime}: validation loss at 21 tokens per parameter"
            path = folder / f"study-{regime}.png"
            plot_comparison(comparisons, path, teacher_loss=chosen["loss"], title=title)


def main() -> None:
    """Write the page and its pictures, or check the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail on a difference")
    check = parser.parse_args().check
    results = Results(Study(STUDY, ROOT / "runs" / "study" / "full", RECORD))
    filled = {page: fill(page.read_text(), results) for page in (PAGE, README)}
    for page, text in filled.items():
        if check and text != page.read_text():
            sys.exit(f"{page} is not what the record says: run examples/study/report.py")
    if wrong := unfounded(filled[PAGE]):
        sys.exit(f"{PAGE} has numbers that stand in none of its tables: {', '.join(wrong)}")
    if not check:
        for page, text in filled.items():
            page.write_text(text)
        draw(results, PAGE.parent)
        print(f"Wrote {PAGE} and the first table of {README}")


if __name__ == "__main__":
    main()
