"""W&B over several starts, with the real library offline, and the record of a start."""

import json
import os
import shutil
import socket
import subprocess
from argparse import Namespace

import pytest

from megatron_let.errors import UsageError
from megatron_let.training import tracking
from megatron_let.training.tracking import git_state, record_start, scrubbed, tracker_defaults


@pytest.fixture(autouse=True)
def environment():
    """Of the last of two ranks, without W&B's variables and proxies; put back afterwards."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith("WANDB_") or name.upper().endswith("_PROXY"):
            del os.environ[name]
    os.environ |= {"RANK": "1", "WORLD_SIZE": "2"}
    yield
    os.environ.clear()
    os.environ.update(before)


def args(save, **values):
    given = {"wandb_project": "", "wandb_save_dir": "", "tensorboard_dir": None}
    return Namespace(save=str(save), **given | values)


def unreachable():
    """The address of a port where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_tensorboard_is_always_on(tmp_path):
    assert tracker_defaults(args(tmp_path)) == {"tensorboard_dir": f"{tmp_path}/tensorboard"}
    assert tracker_defaults(args(tmp_path, tensorboard_dir="elsewhere")) == {}
    assert tracker_defaults(Namespace(save=None, wandb_project="", tensorboard_dir=None)) == {}


def test_a_later_start_goes_on_with_the_same_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_BASE_URL", unreachable())
    ids = []
    for _ in range(2):
        monkeypatch.delenv("WANDB_RUN_ID", raising=False)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        tracker_defaults(args(tmp_path, wandb_project="p"))
        ids.append(os.environ["WANDB_RUN_ID"])
        assert os.environ["WANDB_RESUME"] == "allow"
        assert os.environ["WANDB_MODE"] == "offline"
    assert ids[0] == ids[1] == (tmp_path / tracking.WANDB_ID_FILE).read_text().split()[0]
    assert f"wandb sync {tmp_path}/wandb/wandb/offline-run-*" in capsys.readouterr().out


def test_a_copied_folder_is_another_run_and_a_moved_one_the_same(tmp_path):
    first, copy, moved = (tmp_path / name for name in ("a run", "copy", "moved"))
    known = tracking._wandb_id(first)
    shutil.copytree(first, copy)
    assert tracking._wandb_id(copy) == tracking._wandb_id(copy) != known
    first.rename(moved)
    assert tracking._wandb_id(moved) == tracking._wandb_id(moved) == known
    (moved / tracking.WANDB_ID_FILE).write_text("older\n")  # which has no second line
    assert tracking._wandb_id(moved) == "older"


def test_with_a_host_that_answers_it_is_online(tmp_path, monkeypatch):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        tracker_defaults(args(tmp_path, wandb_project="p"))
    assert "WANDB_MODE" not in os.environ


def test_what_the_user_has_set_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker_defaults(args(tmp_path, wandb_project="p"))
    assert os.environ["WANDB_RUN_ID"] == "mine"
    assert os.environ["WANDB_MODE"] == "disabled"


def test_other_ranks_leave_it_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    tracker_defaults(args(tmp_path, wandb_project="p"))
    assert "WANDB_RUN_ID" not in os.environ
    assert not list(tmp_path.iterdir())


def test_wandb_without_save_is_refused():
    with pytest.raises(UsageError, match="--wandb-project p needs --save"):
        tracker_defaults(Namespace(save=None, wandb_project="p", tensorboard_dir=None))


HIDES = {
    "https://me:pa55word@host/x?token=abcdef&x=1": "https://***@host/x?token=***&x=1",
    "s3://me:sec-ret@bucket/path": "s3://***@bucket/path",
    "https://host/x?X-Amz-Signature=abc&key=9&sig=8": (
        "https://host/x?X-Amz-Signature=***&key=***&sig=***"
    ),
    "--wandb-api-key=0123": "--wandb-api-key=***",
    "password=hunter2 next": "password=*** next",
    "+DB_PASSWORD: 'two words'": "+DB_PASSWORD: ***",
    '-    api_key = "abc"': "-    api_key = ***",
    "Authorization token=abc": "Authorization token=***",
    "hf_AbCdEfGhIjKlMnOp": "***",
    "ghp_abcdefghijklmnop1234": "***",
    "AKIAABCDEFGHIJKLMNOP": "***",
}
KEEPS = [
    "/models/hf_checkpoints/run",
    "--tokenizer-model=/a/b",
    "token: str",
    "git@github.com:a/b",
    "s3://bucket/path",
    "<|endoftext|>",
    "data/pile_text_document",
]


@pytest.mark.parametrize("text", HIDES)
def test_what_looks_like_a_secret_is_hidden(text):
    assert scrubbed(text) == HIDES[text]
    assert scrubbed({"a": [("x", text)]}) == {"a": [["x", HIDES[text]]]}


@pytest.mark.parametrize("text", KEEPS)
def test_other_texts_stay(text):
    assert scrubbed(text) == text


def test_the_name_of_a_value_tells_that_it_is_secret():
    assert scrubbed(["--api-key", "abc", "--lr", "1"]) == ["--api-key", "***", "--lr", "1"]
    assert scrubbed({"db_password": "abc", "tokens": 3}) == {"db_password": "***", "tokens": 3}


def test_three_starts_in_a_second_keep_three_records_without_secrets(tmp_path):
    secret = "open" + "sesame"  # a test that is not committed yet is in the record's diff
    hidden = "NCCL_PASSWD SLURM_DB_PASS SLURM_JWT CUDA_API_KEY OMP_THING WANDB_API_KEY".split()
    os.environ |= dict.fromkeys(hidden, secret)
    os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_NET": f"https://me:{secret}@host"}
    for iteration in (0, 0, 0):
        record_start(tmp_path, Namespace(iteration=iteration, data=f"s3://me:{secret}@x"))
    paths = sorted((tmp_path / "starts").glob("*.json"))
    assert len(paths) == 3 == len(list((tmp_path / "starts").glob("*.flags")))
    for path in paths:
        assert path.stat().st_mode & 0o777 == 0o600
        assert secret not in path.read_text()
    record = json.loads(paths[0].read_text())
    assert record["environment"]["NCCL_DEBUG"] == "INFO"
    assert record["environment"]["NCCL_NET"] == "https://***@host"
    assert not set(hidden) & record["environment"].keys()


def test_git_state_tells_what_was_changed(tmp_path):
    def git(*words):
        name = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *name, *words], cwd=tmp_path, check=True, capture_output=True)

    assert git_state(tmp_path) is None
    git("init")
    (tmp_path / "file").write_text("one\n")
    git("add", "file")
    git("commit", "-m", "first")
    clean = git_state(tmp_path)
    assert len(clean["commit"]) == 40 and clean["changed"] == [] and clean["diff"] == ""
    (tmp_path / "file").write_text("two\n")
    (tmp_path / "new").write_text("")
    changed = git_state(tmp_path)
    assert changed["changed"] == [" M file", "?? new"]
    assert "-one\n+two\n" in changed["diff"]
    (tmp_path / "file").write_bytes("caf\u00e9\n".encode("latin-1"))
    json.dumps(git_state(tmp_path))
