"""`--async-save`: the same checkpoints, whole or not there, whatever ends the run."""

import json
import signal
import time
from pathlib import Path

import psutil
import pytest

from megatron_let.checkpoint.choice import find_damage
from tests.distributed.training import records, run, series
from tests.support.testing import run_distributed, run_program
from tests.support.tiny_run import FLAGS, STEPS, hashes

ROOT = Path(__file__).parents[2]
SYNC = "--hidden-dropout 0.1 --save-interval 3".split()
WRITER = "--use-persistent-ckpt-worker --async-strategy mcore --async-ckpt-cpu-priority 0"
ASYNC = [*SYNC, "--async-save", *WRITER.split()]


def folders(save):
    return sorted(path.name for path in save.glob("iter_*"))


def tracked(save):
    return int((save / "latest_checkpointed_iteration.txt").read_text())


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """The same run with and without."""
    folder = tmp_path_factory.mktemp("whole")
    for name, train, flags in (
        ("sync", "train", SYNC),
        ("async", "train_with_a_slow_writer", ASYNC),
    ):
        argv = [*FLAGS, *corpus.flags, *corpus.let(*flags), "--save", str(folder / name)]
        assert run_distributed(f"tests.distributed.training:{train}", 1, argv) == [None]
    return folder


def test_every_checkpoint_is_the_synchronous_ones_the_last_too(whole):
    assert tracked(whole / "async") == STEPS
    for step in (3, 6, STEPS):  # the last one comes when upstream has closed its writer
        assert find_damage(whole / "async" / f"iter_{step:07d}") is None
        assert hashes(whole / "async", step) == hashes(whole / "sync", step), step


def test_it_is_resumed(corpus, whole, tmp_path):
    load = ("--load", str(whole / "async"), "--ckpt-step", "3", "--verify-integrity")
    flags = [*corpus.flags, *corpus.let(*ASYNC, "--save-interval", "1", "--save-keep-last", "2")]
    assert not run(1, *flags, *load, "--save", str(tmp_path))
    assert tracked(tmp_path) == STEPS and hashes(tmp_path) == hashes(whole / "sync")
    assert folders(tmp_path) == ["iter_0000007", "iter_0000008"]  # older ones are removed


def test_sigterm_ends_with_a_whole_checkpoint(corpus, tmp_path):
    endless = ["--train-iters", "10000", "--let-stop-step", "10000", "--save-interval", "10000"]
    argv = [*FLAGS, *corpus.flags, *corpus.let(*ASYNC, *endless), "--save", str(tmp_path)]
    function = "tests.distributed.training:train_until_sigterm"
    assert run_distributed(function, 1, argv, tmp_path / "metrics.jsonl") == [None]
    last = max(series(tmp_path, "lm loss"))
    assert tracked(tmp_path) == last and find_damage(tmp_path / f"iter_{last:07d}") is None
    assert not list(tmp_path.glob("iter_*/*.part*"))


KILLED = """
import os, runpy, signal, sys, time
from pathlib import Path

if os.fork() == 0:  # in a session of its own, since run_program waits for the parent
    os.setsid()
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    def write(transforms, **named):
        result = right(transforms, **named)
        if "iter_0000006" in named["write_bucket"][0]:
            Path("{save}", "writer").write_text(str(os.getpid()))
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        return result

    right = FileSystemWriterAsync.write_preloaded_data
    FileSystemWriterAsync.write_preloaded_data = staticmethod(write)
    runpy.run_path("{root}/pretrain_let.py", run_name="__main__")
    os._exit(0)
_, status = os.wait()
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_save(corpus, whole, tmp_path):
    save = tmp_path / "run"
    save.mkdir()
    (tmp_path / "killed.py").write_text(KILLED.format(save=save, root=ROOT))
    flags = [*FLAGS, *corpus.flags, *corpus.let(*ASYNC), "--save", str(save)]
    result = run_program(str(tmp_path / "killed.py"), *flags)
    assert result.returncode == 256 - signal.SIGKILL, result.stderr
    writer = int((save / "writer").read_text())
    deadline = time.monotonic() + 5
    while psutil.pid_exists(writer) and psutil.Process(writer).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the writer lives on without its run"
        time.sleep(0.05)
    assert tracked(save) == 3
    assert "half-written" in find_damage(save / "iter_0000006")

    assert not run(1, *flags[len(FLAGS) :], "--load", str(save))
    assert min(step for step in records(save, "start") if step) == 3
    assert hashes(save) == hashes(whole / "sync")


OUT_OF_MEMORY = """
import os, runpy, signal
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron_let.upstream import async_saves

def write(transforms, **named):
    if "iter_0000006" in named["write_bucket"][0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return right(transforms, **named)

right = FileSystemWriterAsync.write_preloaded_data
FileSystemWriterAsync.write_preloaded_data = staticmethod(write)
async_saves.CLOSE_SECONDS = 0.2
runpy.run_path("{root}/pretrain_let.py", run_name="__main__")
"""


def test_a_run_ends_with_its_writer(corpus, tmp_path):
    save = tmp_path / "run"
    (tmp_path / "killed.py").write_text(OUT_OF_MEMORY.format(root=ROOT))
    flags = [*FLAGS, *corpus.flags, *ASYNC, "--save", str(save)]
    result = run_program(str(tmp_path / "killed.py"), *flags, timeout=60)
    assert result.returncode == 1 and "has ended, with status -9" in result.stderr, result.stderr
    assert tracked(save) == 3


def test_a_full_disk(corpus, tmp_path):
    argv = [*FLAGS, *corpus.flags, *ASYNC, "--save", str(tmp_path)]
    function = "tests.distributed.training:train_on_a_full_disk"
    [reason] = run_distributed(function, 1, argv, 100_000)
    assert f"could not be written to {tmp_path}" in reason
    assert not (tmp_path / "latest_checkpointed_iteration.txt").exists()


def test_sums_are_made_of_written_files(whole):
    for name in ("sync", "async"):
        sums = json.loads((whole / name / f"iter_{STEPS:07d}" / "integrity.json").read_text())
        assert {"__0_0.distcp", ".metadata", "metadata.json"} <= sums["files"].keys()
