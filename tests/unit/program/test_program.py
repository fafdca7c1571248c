"""Flags from files."""

import shlex

import pytest

from megatron_let.errors import UsageError
from megatron_let.program import as_lines, collapsed, expanded


def test_a_file_stands_for_its_flags(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "all.flags").write_text(
        "--bf16  # the training precision\n\n--lr 1e-4\n"
    )
    run = tmp_path / "run.flags"
    run.write_text("# a recipe\n@shared/all.flags\n--data-path 1 'a b'\n--lr 3e-4\n")
    assert expanded([f"@{run}", "--lr", "1e-3"]) == [
        "--bf16", "--lr", "1e-4", "--data-path", "1", "a b", "--lr", "3e-4", "--lr", "1e-3",
    ]  # fmt: skip


def test_what_is_written_is_read_back(tmp_path):
    words = ["--data-path", "1", "a b", "it's", "--bf16", "--lr", "-1e-3", "--note", "#5 $HOME"]
    words += ["--entity", "@me", "--save", "/runs/a#1", "--text", "it's $1\nand ~"]
    (tmp_path / "start.flags").write_text(as_lines(words))
    assert expanded([f"@{tmp_path}/start.flags"]) == words
    assert as_lines(words).splitlines()[1] == "--bf16"


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "No such file"),
        ("--lr '1e-3", "No closing quotation"),
        ("@run.flags", "names itself"),
        ("--save $SCRATCH/run", r"write out what \$SCRATCH/run stands for"),
        ("--load ~/run", "write out what ~/run stands for"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, text, words):
    run = tmp_path / "run.flags"
    if text is not None:
        run.write_text(text)
    with pytest.raises(UsageError, match=words):
        expanded([f"@{run}"])


def test_a_line_without_files_stays():
    words = shlex.split("--eod-mask-loss --hub-id a@b --seed 1")
    assert expanded(words) == words and expanded(["@@me"]) == ["@me"]
    assert expanded(collapsed(["@me", "@@me", "me"])) == ["@me", "@@me", "me"]


def test_a_comment_begins_at_a_word(tmp_path):
    run = tmp_path / "run.flags"
    run.write_text("# all\n--save /runs/a#1 # here\n--note 'a # b' \"c # d\"#e\n   # x\n")
    assert expanded([f"@{run}"]) == ["--save", "/runs/a#1", "--note", "a # b", "c # d#e"]


def test_what_only_looks_as_if_a_shell_would_change_it(tmp_path):
    run = tmp_path / "run.flags"
    run.write_text("--a C:\\\\\n--pat a\\$b\n--name \"it's\" --other 'a$b'\n")
    words = ["--a", "C:\\", "--pat", "a$b", "--name", "it's", "--other", "a$b"]
    assert expanded([f"@{run}"]) == words


def test_files_of_other_systems_and_lines_that_go_on(tmp_path):
    run = tmp_path / "run.flags"
    run.write_bytes(b"\xef\xbb\xbf# all \\\r\n--bf16\r\n--data-path a \\\r\n  b\r\n")
    assert expanded([f"@{run}"]) == ["--bf16", "--data-path", "a", "b"]
