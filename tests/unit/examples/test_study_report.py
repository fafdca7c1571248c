"""The page of the study says what the record says, and a wrong digit is seen."""

import re
from pathlib import Path

import pytest

from examples.study.report import (
    BLOCK,
    DECIMAL,
    PAGE,
    README,
    TABLES,
    draw,
    fill,
    spread,
    unfounded,
)
from examples.study.results import Results
from examples.study.run import RECORD
from examples.study.study import Study
from examples.study.table import GROWTH, GUIDED, PAPER, PLAIN, STUDY
from tests.unit.examples.study_record import choose_teacher, new_study, write_run

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def results(tmp_path):
    """Plain and LET tuned, a second seed of both, growth not yet tuned to the end."""
    study = new_study(STUDY, tmp_path)
    for arm, ends in ((PLAIN, (3.2, 3.0, 3.1, 3.05, 3.04)), (GUIDED, (2.9, 2.4, 2.8, 2.7, 2.6))):
        settings = [arm.settings[0]] * 3 + list(arm.settings[1:])
        for name, end, setting in zip(arm.tuning_runs, ends, settings, strict=True):
            rate = arm.rates[arm.tuning_runs.index(name) % 3]
            write_run(study, name, end, rate, setting.name)
    write_run(study, "plain-seed-2", 3.1, 4e-3, "plain")
    write_run(study, "let-seed-2", 2.5, 4e-3, "weight 10")
    write_run(study, "growth-rate-0.001", 2.0, 1e-3, "stack")
    write_run(study, "ahead-let", 2.0, 4e-3, "weight 10")
    write_run(study, "auto-let-seed-2", 2.8, 4e-3, "auto")
    for regime in study.table.regimes:
        choose_teacher(study, regime, 3.3, 5000.0)
    return Results(study)


def test_a_row_holds_the_best_tuning_run_and_the_seeds(results):
    assert [r.planned.name for r in results.seeds(GUIDED)] == ["let-rate-0.004", "let-seed-2"]
    assert results.seeds(GROWTH) == [] and results.seeds(PAPER) == []
    assert results.counts()["tuning"] == (11, 25)
    assert results.at_plain_rate(GUIDED).planned.name == "let-rate-0.004"


def test_numbers_of_the_main_table(results):
    [plain, let] = [row for row in TABLES["meet"](results) if row.startswith(("| plain", "| LET"))]
    cells = [cell.strip() for cell in let.strip("|").split("|")]
    assert cells[:5] == ["LET", "0.004", "weight 10", "2", "2.450 (2.400-2.500)"]
    # From 6 to 2.4 in 1,000 steps: 3.0 after 833; to 2.5: 3.1 after 829. Ten FLOPs a step.
    assert cells[5:7] == ["0.83 (0.83-0.83)"] * 2
    assert cells[7] == "1.33 (1.33-1.33)"  # 5,000 FLOPs of the teacher's own on top of 10,000
    [let] = [row for row in TABLES["scores"](results) if row.startswith("| LET")]
    assert let.strip("| ").endswith("2.400")
    [auto] = TABLES["auto"](results)[2:]
    cells = [cell.strip() for cell in auto.strip("|").split("|")]
    assert cells == ["meet", "LET, auto", "2", "2.800", "2.500", "3.100", "0.50"]
    assert "1.00" in plain and "3.050 (3.000-3.100)" in plain


def test_the_page_is_filled_checked_and_drawn(results, tmp_path):
    tables = PAGE.read_text().partition("## What it says")[0]  # the rest is of the true record
    empty = re.sub(r"(?<= -->\n)(\|.*\n)+(?=<!-- end)", "", tables)
    page = fill(empty, results)
    assert fill(page, results) == page and "**LET**" in page and "| ahead " in page
    assert unfounded(page) == []
    assert unfounded(page + "LET needs 0.83 of the steps.\n") == []
    assert unfounded(page + "LET needs 0.82 of the steps.\n") == ["0.82"]
    draw(results, tmp_path)
    assert (tmp_path / "study-meet.png").exists() and (tmp_path / "study-ahead.png").exists()
    assert not (tmp_path / "study-overtaken.png").exists()


def test_spread():
    assert spread([0.5], 2) == "0.50" and spread([], 2) == spread([None], 2) == "never"
    assert spread([0.4, None, 0.6], 2) == "0.40-never"


def test_the_committed_page_is_what_the_record_says():
    page = PAGE.read_text()
    results = Results(Study(STUDY, ROOT / "runs" / "study" / "full", RECORD))
    readme = README.read_text()
    assert [match[1] for match in BLOCK.finditer(readme)] == ["headline"]
    assert {match[1] for match in BLOCK.finditer(page)} == set(TABLES) - {"headline"}
    assert fill(page, results) == page and fill(readme, results) == readme
    assert unfounded(page) == []


def test_the_readmes_first_numbers_stand_on_the_pages_that_it_names():
    claims = DECIMAL.findall(BLOCK.sub("", README.read_text().partition("## Two commands")[0]))
    pages = "".join((PAGE.parent / name).read_text() for name in ("study.md", "benchmarks.md"))
    known = {*DECIMAL.findall(pages), "2602.05393", "0.27", "1.4"}
    assert [claim for claim in claims if claim not in known] == []
