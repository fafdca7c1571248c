"""Every recipe for the Pile: Megatron takes its flags, and it fits 32 A100-80GB on paper."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from benchmarks.recipes import planned, recipe_flags
from tests.support.testing import run_distributed

ROOT = Path(__file__).resolve().parents[3]
GPUS = 32
METHODS = ("baseline", "let", "salt", "reverse-kd")
PARAMETERS = {"1.4b": 1.416e9, "3b": 2.79e9, "7b": 7.5e9}
RECIPES = [
    *(("1.4b", m, t) for m in METHODS for t in ("smollm-135m", "opt-125m", "pythia-160m", "gpt2")),
    *(("3b", m, "smollm-135m") for m in METHODS),
    ("3b", "salt", "own"),
    *(("7b", m, "llama-3.2-1b") for m in METHODS),
    ("1.4b", "let+salt", "smollm-135m"),
]
IDS = ["-".join(recipe) for recipe in RECIPES]


def write_own_teacher(folder: Path) -> Path:
    """SALT's own pair: a teacher of the 1.4 B recipe's shape, exported."""
    shape = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16}
    shape |= {"intermediate_size": 5504, "vocab_size": 49152, "max_position_embeddings": 2048}
    config = {"model_type": "llama", "tie_word_embeddings": False, "num_key_value_heads": 16}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | shape))
    return folder


@pytest.mark.parametrize(("size", "method", "teacher"), RECIPES, ids=IDS)
def test_fits_on_paper(size: str, method: str, teacher: str, tmp_path: Path) -> None:
    if teacher == "own":
        teacher = str(write_own_teacher(tmp_path / "teacher"))
    flags = recipe_flags(size, method, teacher, tmp_path)
    found = planned(flags, GPUS, teacher)
    assert found.fits
    assert found.run.train_iters * found.run.tokens_per_step == pytest.approx(20e9, rel=1e-3)
    tolerance = 0.01 if teacher == "smollm-135m" else 0.03  # other vocabularies, other sizes
    assert found.student.parameters == pytest.approx(PARAMETERS[size], rel=tolerance)


def test_megatron_takes_the_flags(tmp_path: Path) -> None:
    recipes = {
        f"{size} {method}": recipe_flags(size, method, teacher, tmp_path)
        for size, method, teacher in RECIPES
        if teacher in ("smollm-135m", "llama-3.2-1b")
    }
    [layers] = run_distributed("tests.unit.examples.recipes:layers_of", 1, recipes, GPUS)
    assert {name.split()[0]: n for name, n in layers.items()} == {"1.4b": 24, "3b": 32, "7b": 32}


def test_a_student_that_grows_from_smollm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 layers, 32/8 heads of 64: what its 30, 9/3 of 64 fit into."""
    monkeypatch.setenv("INIT", "grow")
    flags = recipe_flags("1.4b", "baseline", "smollm-135m", tmp_path)
    found = planned(flags, GPUS, "smollm-135m")
    assert found.fits
    assert found.student.parameters == pytest.approx(1.43e9, rel=0.01)
    assert flags[flags.index("--init-from") + 1] == "HuggingFaceTB/SmolLM-135M"
    [layers] = run_distributed("tests.unit.examples.recipes:layers_of", 1, {"grown": flags}, GPUS)
    assert layers == {"grown": 30}
    with pytest.raises(AssertionError, match="INIT=grow: only the 1.4b recipe"):
        recipe_flags("3b", "baseline", "smollm-135m", tmp_path)


def test_two_paths_are_all_that_a_cluster_changes(tmp_path: Path) -> None:
    flags = recipe_flags("1.4b", "let", "smollm-135m", tmp_path)
    elsewhere = recipe_flags("1.4b", "let", "smollm-135m", tmp_path / "other")
    differing = [word for word, other in zip(flags, elsewhere, strict=True) if word != other]
    assert all(word.startswith(str(tmp_path)) for word in differing)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"TEACHER": "bert"}, "TOKENIZER or SMALL bert is unknown: smollm-135m"),
        ({"TEACHER": "/no/such"}, "/no/such does not exist"),
        ({"SMALL": "a/b"}, "SMALL a/b has no effect without INIT=grow"),
        ({"METHOD": "kd"}, "METHOD kd is unknown: baseline"),
        ({}, "Make it with examples/pile/preprocess.sh PILE HuggingFaceTB/SmolLM-135M"),
    ],
)
def test_bad_input(env: dict[str, str], message: str, tmp_path: Path) -> None:
    if "METHOD" in env:
        recipe_flags("1.4b", "let", "smollm-135m", tmp_path)  # makes the data
    env = {"DATA": str(tmp_path / "data"), "SAVE": str(tmp_path)} | env
    script = ROOT / "examples" / "pile_1.4b" / "train.sh"
    done = subprocess.run(["bash", script], env=os.environ | env, capture_output=True, text=True)
    assert done.returncode != 0 and message in done.stderr


def start(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Start the 1.4 B recipe from another folder, with an `sbatch` that says what it was given."""
    stand_in = tmp_path / "bin" / "sbatch"
    stand_in.parent.mkdir(exist_ok=True)
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    own = os.environ | variables | {"PATH": f"{stand_in.parent}:{os.environ['PATH']}"}
    script = str(ROOT / "examples" / "pile_1.4b" / "train.sh")
    command = ["bash", script]
    return subprocess.run(
        command, env=own, cwd=tmp_path, capture_output=True, text=True, check=False
    )


def test_a_start_passes_options_on_and_takes_relative_folders(tmp_path: Path) -> None:
    for folder in ("small/model", "data/model"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "data/model/pile_text_blend.txt").write_text("1 a 2 b")
    given = {"DATA": "data", "SAVE": "save", "TEACHER": "small/model"}
    done = start(tmp_path, SBATCH_OPTIONS="--partition=a100 --account=me", **given)
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    assert words[:2] == ["--partition=a100", "--account=me"]
    assert str(tmp_path / "small/model") == words[words.index("--teacher-model") + 1]
    data = words.index("--train-data-path")
    assert words[data + 1 : data + 5] == ["1", "a", "2", "b"]
    assert words[words.index("--save") + 1].startswith(str(tmp_path / "save"))


def test_what_grows_has_a_path_and_a_run_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "my small").mkdir()
    done = start(tmp_path, INIT="grow", SMALL="./my small", PRINT="1")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)  # as xargs does
    assert words[words.index("--init-from") + 1] == str(tmp_path / "my small")
    assert words[words.index("--save") + 1].endswith("-1234-grow-my small")


@pytest.mark.parametrize("given", [{"DATA": "my data"}, {"TOKENIZER": "Qwen/my own"}])
def test_a_path_with_a_blank_is_refused(given: dict[str, str], tmp_path: Path) -> None:
    done = start(tmp_path, PRINT="1", **given)
    assert done.returncode == 1 and "a path with a blank" in done.stderr
    preprocess = ["bash", ROOT / "examples" / "pile" / "preprocess.sh", "pile", "gpt2", "my data"]
    done = subprocess.run(preprocess, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "a path with a blank" in done.stderr
