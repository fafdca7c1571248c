"""The nine tasks by the real harness, on small local data of the same formats."""

import json
import math
import shutil
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from transformers import BloomConfig, BloomForCausalLM, Gemma3Config, GPT2Config, MptConfig

from megatron_let.commands.evaluate import main
from megatron_let.errors import UsageError
from megatron_let.evaluation.harness import (
    PAPER_TASKS,
    Harness,
    TaskScore,
    _task_manager,
    find_tasks,
    local_data,
)
from megatron_let.evaluation.results import accuracy_table, identity, mean_of
from megatron_let.hugging_face import context
from tests.unit.conversion.hf_models import make_model, save_model, write_tokenizer
from tests.unit.evaluation.task_data import QUESTIONS, write_task_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two models and the tasks' data."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_task_data(folder / "data")
    save_model("llama", folder / "one")
    make_model("llama", seed=1).save_pretrained(folder / "two")
    write_tokenizer(folder / "two")
    return folder


def test_the_tasks_are_the_harness_own() -> None:
    manager = _task_manager()
    for task in PAPER_TASKS:
        path = manager.task_index[task.name].yaml_path
        text = path.read_text()
        if text.startswith("include:"):
            text += path.with_name(text.split()[1]).read_text()
        assert f"dataset_path: {task.dataset}\n" in text
        assert f"dataset_name: {task.subset or 'null'}\n" in text


def test_all_nine_side_by_side(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def evaluate(*flags: str) -> str:
        models = [f"first={folder / 'one'}", str(folder / "two")]
        data = ["--task-data", str(folder / "data"), "--output", str(folder / "out")]
        main(["tasks", *models, *data, *flags])
        return capfd.readouterr()

    printed = evaluate()
    lines = printed.out.strip().splitlines()
    names = [line.split("|")[1].strip() for line in lines[2:13]]
    assert names == [*(task.name for task in PAPER_TASKS), "average", "less first"]
    kept = json.loads((folder / "out" / "first-tasks.json").read_text())["results"]
    assert {name: len(score["correct"]) for name, score in kept.items()} == {
        task.name: QUESTIONS for task in PAPER_TASKS
    }
    assert "first: piqa" in printed.err and "two: boolq" in printed.err
    assert "it/s" not in printed.err  # no bars without a terminal

    again = evaluate()  # nothing is done twice
    assert again.out == printed.out and "piqa" not in again.err
    with pytest.raises(SystemExit):
        evaluate("--num-fewshot", "0")
    assert "holds results with shots 1, and this is 0" in capfd.readouterr().err


def test_a_killed_evaluation_goes_on(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = folder / "half"
    output.mkdir()
    content = json.loads((folder / "out" / "first-tasks.json").read_text())
    del content["results"]["boolq"]
    (output / "first-tasks.json").write_text(json.dumps(content))
    flags = ["--task-data", str(folder / "data"), "--output", str(output), "--device", "cpu"]
    main(["tasks", f"first={folder / 'one'}", *flags])
    assert capfd.readouterr().err.split() == ["first:", "boolq"]
    again = json.loads((output / "first-tasks.json").read_text())
    assert again == json.loads((folder / "out" / "first-tasks.json").read_text())


def test_bad_input(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="--tasks mmlu is none of hellaswag"):
        find_tasks(["mmlu"])
    make_model("llama").save_pretrained(tmp_path / "endless")
    config = json.loads((folder / "one" / "tokenizer_config.json").read_text())
    shutil.copy(folder / "one" / "tokenizer.json", tmp_path / "endless")
    named = {key: value for key, value in config.items() if not key.endswith("os_token")}
    (tmp_path / "endless" / "tokenizer_config.json").write_text(json.dumps(named))
    with pytest.raises(UsageError, match="endless has neither bos_token nor eos_token"):
        Harness(tmp_path / "endless", "auto", "cpu", 1)
    shutil.copytree(folder / "data" / "baber", tmp_path / "baber")
    with pytest.raises(UsageError, match="lacks 7 data sets") as error:
        local_data(PAPER_TASKS, tmp_path)
    assert str(error.value).count("hf download --repo-type dataset") == 7
    for models, message in (
        (["nowhere"], "nowhere is no exported model"),
        ([str(folder / "one"), str(folder / "one")], "needs a label of its own"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["tasks", *models, "--output", str(tmp_path / "out")])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    for flags, message in (
        (["--context", "99999"], "reads 1 to 16384 tokens"),
        (["--context", "8", "--stride", "9"], "--stride 9 must be 1 to --context 8"),
        (["--context", "0"], "argument --context: 0 is no number from 1 on"),
        (["--batch-size", "auto"], "auto is no number from 1 on"),
        (["--json-key", "none"], "holds no text in --json-key none"),
        (["--json-key", "text"], "one-text.json holds no results"),
    ):
        (tmp_path / "text.jsonl").write_text('{"text": "w1", "none": ""}\n')
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "one-text.json").write_text("[]")
        text = ["--input", str(tmp_path / "text.jsonl"), "--output", str(tmp_path / "out")]
        with pytest.raises(SystemExit):
            main(["text", str(folder / "one"), *text, *flags])
        assert message in capsys.readouterr().err


def test_text(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "text.jsonl"
    rows = [{"text": f"w{i} w{i + 1} w{i + 2}", "meta": {"set": "xy"[i % 2]}} for i in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    parquet.write_table(pyarrow.Table.from_pylist(rows[4:]), table := tmp_path / "more.parquet")
    flags = [
        "--input",
        str(file),
        str(table),
        "--by-meta",
        "set",
        "--context",
        "32",
        "--device",
        "cpu",
    ]
    command = ["text", str(folder / "one"), str(folder / "two"), *flags]
    main([*command, "--output", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert [line.split("|")[1].strip() for line in printed.out.splitlines()[2:]] == [
        "x",
        "y",
        "all",
    ]
    main([*command, "--output", str(tmp_path / "out")])
    again = capsys.readouterr()
    assert again.out == printed.out and not again.err
    monkeypatch.chdir(folder / "one")
    main(["text", ".", f"a=b={folder / 'two'}", *flags, "--output", str(tmp_path / "here")])
    assert "|             one |             a=b |" in capsys.readouterr().out
    file.write_text('{"text": 5}\n')
    with pytest.raises(SystemExit):
        main([*command, "--output", str(tmp_path / "new")])
    assert "text.jsonl:1: the value of 'text' must be a string" in capsys.readouterr().err


def test_models_that_read_texts_of_different_lengths(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "two", tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": 16})
    )
    (tmp_path / "text.jsonl").write_text('{"text": "w5 w6 w7"}\n')
    words = ["text", str(folder / "one"), str(tmp_path / "short"), "--device", "cpu"]
    words += ["--input", str(tmp_path / "text.jsonl"), "--output", str(tmp_path / "out")]
    main(words)
    assert "Tokens read at once: one 16384, short 16. To compare" in capsys.readouterr().out
    main([*words[:-1], str(tmp_path / "alike"), "--context", "16"])
    assert "at once" not in capsys.readouterr().out


def test_results_are_of_the_files_that_make_a_model(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder / "one", model)
    (model / "tokenizer").mkdir()
    (model / "tokenizer" / "tokenizer.json").touch()
    (model / "tokenizer.model").write_text("pieces")
    before = identity(model)
    (model / "model-text.json").write_text("{}")  # an --output in the model's folder
    assert identity(model) == before
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer/tokenizer.json"):
        (model / name).write_text("other ones")
        assert identity(model) != before
        before = identity(model)


def test_the_longest_text_has_many_names(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert context(MptConfig(max_seq_len=64)) == context(GPT2Config(n_positions=64)) == 64
    assert context(Gemma3Config(text_config={"max_position_embeddings": 64})) == 64
    sizes = {"hidden_size": 32, "n_layer": 1, "n_head": 4}
    BloomForCausalLM(BloomConfig(vocab_size=300, **sizes)).save_pretrained(tmp_path / "bloom")
    write_tokenizer(tmp_path / "bloom")
    (tmp_path / "text.jsonl").write_text('{"text": "w5 w6 w7"}\n')
    text = ["--input", str(tmp_path / "text.jsonl"), "--device", "cpu"]
    command = ["text", str(tmp_path / "bloom"), *text, "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(command)
    assert "texts of any length: tell how much at once by --context" in capsys.readouterr().err
    main([*command, "--context", "16"])
    assert "bloom" in capsys.readouterr().out


def test_averages_and_paired_errors() -> None:
    first = {"piqa": TaskScore([1, 0, 1, 1], None, 0), "sciq": TaskScore([0, 0, 1, 0], None, 2)}
    second = {"piqa": TaskScore([1, 1, 1, 1], None, 0), "sciq": TaskScore([0, 0, 1, 1], None, 0)}
    mean, error = mean_of(first["piqa"].correct)
    assert (mean, error) == (0.75, pytest.approx(math.sqrt(0.25 / 4)))
    lines = accuracy_table({"a": first, "b": second}, shots=1).splitlines()
    assert "| 50.0 ± 17.7 |" in lines[4]
    # One question of four is answered better in each task; error of a mean of two means.
    assert "| +25.0 ± 17.7 |" in lines[5]
    assert lines[-1] == "a: 2 prompts were longer than its context and lost their beginning."
