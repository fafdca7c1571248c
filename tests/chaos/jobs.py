"""Starts of a run, under a real torchrun; forked from this process, which has imported Megatron.

A start is torchrun's own `main` in a fork, and its ranks are forks of that where it would execute
Python once more: agent, supervision and signals are torchrun's, and no import is paid for. With
`Job.executed` every process is executed instead, as a user's are.
"""

import contextlib
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

ROOT = Path(__file__).resolve().parents[2]
RANK = str(ROOT / "tests" / "chaos" / "rank.py")
JOB_SECONDS = 240


class _Fork(subprocess.Popen):
    """A process that runs a Python file as `python FILE ARGV` would, in a fork of this one."""

    def _execute_child(self, args: Any, *others: Any) -> None:
        env, (_, _, _, out, _, err) = others[5], others[9:15]
        self.pid = os.fork()
        self._child_created = True
        if self.pid == 0:
            _run_in_fork(list(args), env, out, err)


def _run_in_fork(words: list[str], env: dict[str, str], out: int, err: int) -> None:
    """Never returns; `words` are Python, its options and a file, or torchrun and its arguments."""
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        for descriptor, stream in ((out, 1), (err, 2)):
            if descriptor != -1:
                os.dup2(descriptor, stream)
        os.environ.clear()
        os.environ.update(env)
        subprocess_handler.Popen = _Fork  # type: ignore[misc]
        if words[0] == "torchrun":
            torchrun.main(words[1:])
        else:
            sys.argv = words[words.index(RANK) :]
            runpy.run_path(RANK, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]  # ends pools, joins what is no daemon
        from multiprocessing import util

        util._exit_function()  # type: ignore[attr-defined]
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


class Job:
    """One start of a run.

    Args:
        processes: ranks.
        argv: of `pretrain_let.py`.
        folder: where its log and its marks go; not `--save`, which may be full.
        point: where in the program a rank waits for what befalls it, see `points.py`.
        largest_file: bytes; a file can't grow beyond them.
    """

    executed = False

    def __init__(
        self,
        processes: int,
        argv: list[str],
        folder: Path,
        point: str = "",
        largest_file: int | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for mark in folder.glob("mark-*"):
            mark.unlink()
        self.folder = folder
        words = f"--standalone --nproc-per-node {processes}".split() + [RANK, *argv]
        env = os.environ | {"OMP_NUM_THREADS": "1", "CHAOS_FOLDER": str(folder)}
        env |= {"CHAOS_POINT": point, "PYTHONPATH": str(ROOT)}
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, limits[1]))
        try:
            with (folder / "log.txt").open("ab") as log:
                pipes: dict[str, Any] = {"stdout": log, "stderr": log, "env": env, "cwd": ROOT}
                if self.executed:
                    command = [sys.executable, "-m", "torch.distributed.run", *words]
                    self.process = subprocess.Popen(command, start_new_session=True, **pipes)
                else:
                    self.process = _Fork(["torchrun", *words], start_new_session=True, **pipes)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def ranks(self) -> list[psutil.Process]:
        """The training processes that live, as far as they have been started."""
        pids = [int(mark.read_text() or 0) for mark in self.folder.glob("mark-rank-*")]
        found = []
        for pid in filter(None, pids):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def log(self) -> str:
        """What was printed, by all starts."""
        return (self.folder / "log.txt").read_text(errors="replace")

    @property
    def is_running(self) -> bool:
        """Whether torchrun lives."""
        return self.process.poll() is None

    def wait(self) -> int:
        """Wait for the end; returns torchrun's exit status.

        Raises:
            RuntimeError: it does not end; then everything of it is killed.
        """
        try:
            return self.process.wait(JOB_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(f"the job hangs: {self.folder / 'log.txt'}") from None

    def kill(self) -> int:
        """SIGKILL torchrun and all below it at once, as when a node goes; returns how many."""
        with contextlib.suppress(psutil.NoSuchProcess):
            agent = psutil.Process(self.process.pid)
            agent.suspend()  # or it would see a rank die first, and end the others gently
            below = [*agent.children(recursive=True), agent]
            for process in below:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait()
            return len(below)
        return 0

    def wait_for(self, condition: Callable[[], bool], seconds: float = JOB_SECONDS) -> bool:
        """Wait until something holds, or the job has ended; returns whether it holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not self.is_running or time.monotonic() > deadline:
                return condition()
            time.sleep(0.01)
        return True
