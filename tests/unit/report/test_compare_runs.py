"""`tools/compare_runs.py`: what a user gives, and what comes back."""

import json
import re
from pathlib import Path

import pytest

from megatron_let.commands.compare_runs import main


@pytest.fixture
def folders(write, lines):
    """Folders of a plain run, two LET runs and the teacher's own."""
    start, valid, _ = lines
    teacher = {"name": "small", "parameters": 10, "fingerprint": "abc", "lm_loss": 3.0}

    def run(name, losses, **facts):
        records = [valid(10 * place, loss) for place, loss in enumerate(losses, start=1)]
        records[-1]["peak memory"] = 3.0 * 2**30
        return str(write(start(data="d1") | facts, *records, folder=name))

    let = {"method": "let", "teacher": teacher}
    return {
        "plain": run("plain", [6.0, 5.0, 4.5, 4.0]),
        "let": run("let", [5.0, 3.0, 2.9, 2.8], **let),
        "other": run("a=b", [5.0, 4.5, 3.5, 3.0], **let),
        "elsewhere": run("elsewhere", [5.0, 4.5, 3.5, 3.0], **let, data="d2"),
        "small": run("small", [4.0, 3.6, 3.5, 3.4], method="baseline"),
    }


def test_tables_regime_and_picture(folders, tmp_path, capsys):
    kept, picture = tmp_path / "new" / "report.md", tmp_path / "report"  # not report.png
    words = [folders["plain"], folders["let"], f"LET, weight=3={folders['other']}"]
    main([*words, "--teacher", folders["small"], "--output", str(kept), "--plot", str(picture)])
    printed = capsys.readouterr().out
    assert "| let " in printed and "| LET, weight=3 |" in printed
    assert "3.00 GiB" in printed
    assert "Regime: the plain student stays worse than its teacher" in printed
    assert kept.read_text() in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_losses_of_different_texts_are_told(folders, tmp_path, capsys):
    for name, data in (("plain", "pile"), ("let", "books")):
        (tmp_path / name / "starts").mkdir()
        record = {"arguments": {"valid_data_path": [data], "eval_iters": 5, "lr": len(data)}}
        (tmp_path / name / "starts" / "1.json").write_text(json.dumps(record))
    main([folders["plain"], folders["let"]])
    told = capsys.readouterr().out.partition("not of the same text")[2]
    assert re.findall(r"^\| (\w+).*books", told, re.MULTILINE) == ["valid_data_path"]
    assert "eval_iters" not in told and "lr" not in told


def test_every_seed_and_the_teacher_are_judged_by_one_text(folders, write, lines, capsys):
    start, valid, _ = lines
    more = write(start(data="d1", seed=2), valid(40, 4.0), folder="plain-2")
    for folder, length in ((folders["plain"], 5), (more, 6), (folders["small"], 7)):
        (Path(folder) / "starts").mkdir()
        record = {"arguments": {"eval_iters": length}}
        (Path(folder) / "starts" / "1.json").write_text(json.dumps(record))
    main([folders["plain"], str(more), "--teacher", folders["small"]])
    told = capsys.readouterr().out.partition("not of the same text")[2]
    assert "| baseline, seed 1 | baseline, seed 2 | teacher |" in told
    assert re.search(r"^\| eval_iters \| +5 \| +6 \| +7 \|$", told, re.MULTILINE)


def test_seeds_of_one_label_that_are_not_alike_are_told(write, lines, capsys):
    start, valid, _ = lines
    words = []
    for seed, weight in ((1, 0.1), (2, 3.0), (3, None)):
        for method in ("baseline", "let"):
            run = start(seed=seed, method=method), valid(40, 4.0)
            folder = write(*run, folder=f"{method}{seed}")
            words.append(str(folder))
            if weight is not None:  # else nothing is known of it but its losses
                (folder / "starts").mkdir()
                record = {"seed": seed, "let_weight": weight * (method == "let")}
                record |= {"kd_selection": f"{seed}.npz", "world_size": 8 // seed}
                record = {"arguments": record}
                (folder / "starts" / "1.json").write_text(json.dumps(record))
    main(words)
    _, seconds, plain, let = capsys.readouterr().out.split("WARNING: ")
    assert seconds.startswith("the seconds are of other machines. The runs differ in")
    assert plain.startswith("the means of 'baseline' are of runs that differ in")
    assert let.startswith("the means of 'let' are of runs that differ in")
    assert re.search(r"^\| let_weight \| +0.1 \| +3.0 \|$", let, re.MULTILINE)
    assert re.search(r"^\| world_size +\| +8 \| +4 \|$", let, re.MULTILINE)
    assert "npz" not in let


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["let"], "has seed 1, and no plain run has: add the run with --method baseline --seed 1"),
        (["plain", "let", "other"], "are both 'let' with seed 1: leave one out, or give them lab"),
        (["plain", "elsewhere"], "has data order d2 and the plain run .* has d1: only runs of the"),
    ],
)
def test_mistakes_end_in_one_paragraph(folders, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main([folders[word] for word in words])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error), error


def test_a_folder_without_a_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "nowhere")])
    assert "nowhere does not exist: give the folder of a run" in capsys.readouterr().err
