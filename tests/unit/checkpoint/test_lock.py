"""One run at a time in a `--save`: real processes, which end in their several ways."""

import contextlib
import os
import platform
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest

from megatron_let import files
from megatron_let.checkpoint import lock
from megatron_let.checkpoint.lock import FILE, one_run_in, save_folder
from megatron_let.errors import MachineError
from tests.support.testing import run_program

HOLD = """
import os, sys, time
from pathlib import Path
from megatron_let.checkpoint import lock
lock.BEAT_SECONDS = 0.1
with lock.one_run_in(Path(sys.argv[1])):
    if len(sys.argv) > 2 and os.fork() == 0:  # as the writer of an asynchronous save
        time.sleep(60)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)


@pytest.fixture
def hold(tmp_path):
    """Start processes that hold the lock until their input ends."""
    started = []

    def start(*words):
        command = [sys.executable, "-c", HOLD, str(tmp_path / "run"), *words]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen(command, start_new_session=True, **pipes))
        assert started[-1].stdout.readline() == b"held\n"
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_second_run_names_the_first(hold, tmp_path):
    first = hold()
    with pytest.raises(MachineError) as error, one_run_in(tmp_path / "run"):
        pass
    assert f"{platform.node()}, process {first.pid}, since 20" in str(error.value)
    assert f"--save {tmp_path / 'run'} belongs to another run" in str(error.value)
    os.kill(first.pid, signal.SIGSTOP)  # hangs, and may go on
    with pytest.raises(MachineError), one_run_in(tmp_path / "run"):
        pass


@pytest.mark.parametrize("words", [[], ["with a child"]], ids=["alone", "child_lives_on"])
def test_a_killed_run_blocks_nobody(hold, tmp_path, words):
    first = hold(*words)
    first.kill()
    first.wait()
    assert (tmp_path / "run" / FILE).exists()
    before = time.monotonic()
    with one_run_in(tmp_path / "run"):
        assert f"process {os.getpid()}," in (tmp_path / "run" / FILE).read_text()
    assert time.monotonic() - before < lock.PATIENCE_SECONDS
    assert not (tmp_path / "run" / FILE).exists()


def test_a_run_that_is_ending_is_waited_for(hold, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 60)
    first = hold()
    first.stdin.close()
    with one_run_in(tmp_path / "run"):
        assert f"process {os.getpid()}," in (tmp_path / "run" / FILE).read_text()


def test_a_lost_node_whose_lock_the_server_keeps(hold, tmp_path, capsys):
    """It is another one's, and its file is not touched any more."""
    first = hold()
    os.kill(first.pid, signal.SIGSTOP)
    path = tmp_path / "run" / FILE
    path.write_text("node7, process 1, since 2026-11-26 00:00:00 UTC\n")
    with one_run_in(tmp_path / "run"):
        assert f"process {os.getpid()}," in path.read_text()
    assert "node7, process 1, since 2026-11-26 00:00:00 UTC: gives no" in capsys.readouterr().out


def test_a_run_on_another_node(hold, tmp_path):
    hold()
    (tmp_path / "run" / FILE).write_bytes(b"node7, process 1\xff, since then\n")
    with pytest.raises(MachineError, match="node7, process 1"), one_run_in(tmp_path / "run"):
        pass


def test_without_locks_the_age_decides(tmp_path, capsys):
    folder = tmp_path / "run"
    refuse = mock.Mock(side_effect=OSError(files.NO_LOCKS[0], "No locks available"))
    with mock.patch("fcntl.lockf", refuse):
        with one_run_in(folder):
            assert "> no locks on this file system" in capsys.readouterr().out
            with pytest.raises(MachineError), one_run_in(folder):
                pass
        folder.mkdir()
        (folder / FILE).write_text("node7, process 1, since then\n")
        with one_run_in(folder):
            pass


def test_a_file_that_its_holder_removes_meanwhile(tmp_path, monkeypatch):
    def removed(file):
        removing.pop()(file.name)
        return kept(file)

    kept, removing = files.lock, [lambda name: None, os.unlink]
    monkeypatch.setattr(lock, "lock", removed)
    with one_run_in(tmp_path):
        assert (tmp_path / FILE).exists()


def test_who_took_its_place_keeps_it(tmp_path):
    with one_run_in(tmp_path):
        (tmp_path / FILE).rename(tmp_path / "old")  # or the file system may use its number again
        (tmp_path / FILE).write_text("node7, process 1, since now\n")
    assert (tmp_path / FILE).exists()


PROGRAM = """
import runpy
from megatron_let.checkpoint import lock
lock.PATIENCE_SECONDS = 0
runpy.run_path("pretrain_let.py", run_name="__main__")
"""


def test_a_run_writes_nothing_before(tmp_path):
    (tmp_path / "impatient.py").write_text(PROGRAM)
    folder = tmp_path / "run"
    with one_run_in(folder):
        result = run_program(str(tmp_path / "impatient.py"), "--save", str(folder))
        assert [path.name for path in folder.iterdir()] == [FILE]
    assert result.returncode == MachineError.status
    assert result.stderr.startswith(f"pretrain_let.py: error: --save {folder} belongs to another")
    assert f"process {os.getpid()}, since" in result.stderr


def test_a_folder_of_nobody_is_left_as_it_was(tmp_path, monkeypatch):
    with one_run_in(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    monkeypatch.setenv("RANK", "1")
    with one_run_in(tmp_path / "new"), one_run_in(None):
        assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(MachineError, match="cannot be written"),
        one_run_in(tmp_path / "file" / "a"),
    ):
        pass


def test_the_folder_is_read_from_the_command_line(tmp_path):
    argv = ["pretrain_let.py", "--save-interval", "2", "--save", str(tmp_path), "--load", "x"]
    assert save_folder(argv) == tmp_path
    assert save_folder([*argv, f"--save={tmp_path / 'b'}"]) == tmp_path / "b"
    assert save_folder(["pretrain_let.py", "--save-interval", "2"]) is None
