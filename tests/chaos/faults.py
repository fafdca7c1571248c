"""Faults that befall a training job, and what must come of them: the weights of an undisturbed run.

Every fault has a small LET run of its own, started by torchrun: it is hit once, started again as
often as it needs, and compared bit for bit, weights and optimizer.
"""

import contextlib
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_let.checkpoints import find_damage
from megatron_let.conversion.checkpoint import TRACKER
from tests.support.tiny_run import FLAGS, Corpus, hashes

ROOT = Path(__file__).resolve().parents[2]
STEPS, INTERVAL = 60, 15
RUN = (
    f"--train-iters {STEPS} --save-interval {INTERVAL} --eval-interval {INTERVAL} --eval-iters 2 "
    "--hidden-dropout 0.1 --verify-integrity --exit-signal-handler --distributed-timeout-minutes 1"
).split()
LET = f"--let-stop-step {STEPS // 2}".split()
LAYOUTS = {
    "DP 2": (2, ""),
    "DP 2, ZeRO-1": (2, "--use-distributed-optimizer"),
    "TP 2, SP": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "PP 2": (2, "--pipeline-model-parallel-size 2"),
}
MAX_STARTS = 6
START_SECONDS = 12
"""A fault at start-up comes within this."""
JOB_SECONDS = 300
FULL_DISK_BYTES = 100_000
"""Largest file that a job on a full disk can write; a checkpoint's are larger."""


class Job:
    """One start of the run, in a process group of its own."""

    def __init__(self, corpus: Corpus, layout: str, save: Path, full_disk: bool = False) -> None:
        processes, flags = LAYOUTS[layout]
        self.save = save
        torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {processes}"
        command = [sys.executable, *torchrun.split(), str(ROOT / "pretrain_let.py"), *FLAGS]
        command += [*RUN, *flags.split(), *corpus.flags, *corpus.let(*LET), "--save", str(save)]
        if (save / TRACKER).is_file():
            command += ["--load", str(save)]
        save.mkdir(parents=True, exist_ok=True)
        self._log = (save / "log.txt").open("ab")
        limit = (FULL_DISK_BYTES, FULL_DISK_BYTES)
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            preexec_fn=lambda: (
                resource.setrlimit(resource.RLIMIT_FSIZE, limit) if full_disk else None
            ),
        )

    def ranks(self) -> list[psutil.Process]:
        """The training processes, as far as they have been started."""
        below = psutil.Process(self.process.pid).children(recursive=False)
        return [child for child in below if "pretrain_let.py" in " ".join(child.cmdline())]

    def wait(self) -> int:
        """Wait for the end; returns torchrun's exit status.

        Raises:
            RuntimeError: it does not end; then everything of it is killed.
        """
        try:
            return self.process.wait(JOB_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(f"the job hangs: {self.save / 'log.txt'}") from None
        finally:
            self._log.close()

    def kill(self) -> None:
        """SIGKILL torchrun and all ranks at once, as when a node goes."""
        with contextlib.suppress(psutil.NoSuchProcess):
            torchrun = psutil.Process(self.process.pid)
            torchrun.suspend()  # or it would see a rank die first, and end the others gently
            for process in [*torchrun.children(recursive=True), torchrun]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until something holds, or the job has ended."""
        deadline = time.monotonic() + JOB_SECONDS
        while not condition() and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)


# --- when --------------------------------------------------------------------------------------


def _steps_logged(save: Path) -> int:
    metrics = save / "metrics.jsonl"
    return metrics.read_text().count('"kind": "train"') if metrics.exists() else 0


def at_start(job: Job, rng: random.Random) -> None:
    """While it imports, builds data or sets up its groups."""
    end = time.monotonic() + rng.uniform(0, START_SECONDS)
    job.wait_for(lambda: time.monotonic() > end)


def in_training(job: Job, rng: random.Random) -> None:
    """After some steps, perhaps in an evaluation."""
    wanted = _steps_logged(job.save) + rng.randint(INTERVAL + 1, STEPS - INTERVAL)
    job.wait_for(lambda: _steps_logged(job.save) >= wanted)


def late_in_training(job: Job, rng: random.Random) -> None:
    """When there are two checkpoints."""
    wanted = rng.randint(2 * INTERVAL + 1, STEPS - INTERVAL)
    job.wait_for(lambda: _steps_logged(job.save) >= wanted)


def in_a_save(job: Job, rng: random.Random) -> None:
    """When the folder of a second checkpoint is there and its tracker is not."""
    job.wait_for((job.save / TRACKER).is_file)
    before = {path.name for path in job.save.glob("iter_*")}
    job.wait_for(lambda: {path.name for path in job.save.glob("iter_*")} > before)
    time.sleep(rng.uniform(0, 0.05))


MOMENTS = {
    "start": at_start,
    "training": in_training,
    "late": late_in_training,
    "save": in_a_save,
}


# --- what --------------------------------------------------------------------------------------


def kill_a_rank(job: Job, rng: random.Random) -> None:
    """SIGKILL one rank; torchrun must end the others."""
    if ranks := job.ranks():
        rng.choice(ranks).kill()


def kill_all(job: Job, rng: random.Random) -> None:
    """SIGKILL torchrun and every rank."""
    job.kill()


def terminate(job: Job, rng: random.Random) -> None:
    """SIGTERM, as a scheduler sends it before the time limit."""
    job.process.terminate()


def pause_a_rank(job: Job, rng: random.Random) -> None:
    """SIGSTOP one rank for some seconds."""
    if ranks := job.ranks():
        rank = rng.choice(ranks)
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.suspend()
            time.sleep(rng.uniform(1, 5))
            rank.resume()


def hang_a_rank(job: Job, rng: random.Random) -> None:
    """SIGSTOP one rank for good; the others must give up waiting, and torchrun must end the job."""
    if ranks := job.ranks():
        with contextlib.suppress(psutil.NoSuchProcess):
            rng.choice(ranks).suspend()


def cut_a_file(job: Job, rng: random.Random) -> None:
    """Kill the job and cut a file of its newest checkpoint."""
    job.kill()
    if path := _newest_file(job.save, rng):
        os.truncate(path, rng.randrange(path.stat().st_size))


def flip_a_bit(job: Job, rng: random.Random) -> None:
    """Kill the job and flip a bit of its newest checkpoint."""
    job.kill()
    if path := _newest_file(job.save, rng):
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)


def _newest_file(save: Path, rng: random.Random) -> Path | None:
    """A file of the checkpoint that the tracker names."""
    if not (save / TRACKER).is_file():
        return None
    folder = save / f"iter_{int((save / TRACKER).read_text()):07d}"
    return rng.choice(sorted(path for path in folder.iterdir() if path.stat().st_size))


FAULTS: dict[str, tuple[Callable[[Job, random.Random], None] | None, tuple[str, ...]]] = {
    "kill a rank": (kill_a_rank, ("start", "training", "save")),
    "kill all": (kill_all, ("start", "training", "save")),
    "TERM": (terminate, ("start", "training", "save")),
    "pause a rank": (pause_a_rank, ("training", "save")),
    "hang a rank": (hang_a_rank, ("training",)),
    "cut a file": (cut_a_file, ("late",)),
    "flip a bit": (flip_a_bit, ("late",)),
    "disk full": (None, ("save",)),  # the first start's; it needs nobody to inject it
}
"""What happens and when; a damaged checkpoint needs one before it."""


@dataclass(frozen=True)
class Outcome:
    """What came of one fault."""

    fault: str
    moment: str
    layout: str
    steps_before: int
    """Logged when the fault came."""
    starts: int
    """Of the run in all."""
    put_aside: int
    """Checkpoints that were found damaged."""
    survived: bool
    """The weights and the optimizer are those of the undisturbed run."""
    seconds: float


def run_to_its_end(corpus: Corpus, layout: str, save: Path) -> int:
    """Start the run until it is complete; returns how many starts it took.

    Raises:
        RuntimeError: it does not get on.
    """
    for start in range(1, MAX_STARTS + 1):
        Job(corpus, layout, save).wait()
        if _is_complete(save):
            return start
    raise RuntimeError(f"not complete after {MAX_STARTS} starts: {save / 'log.txt'}")


def _is_complete(save: Path) -> bool:
    metrics = save / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return bool(lines) and '"kind": "end"' in lines[-1]


def befall(
    corpus: Corpus, layout: str, fault: str, moment: str, save: Path, seed: int, whole: Path
) -> Outcome:
    """Run once with a fault, and compare with the undisturbed run `whole`."""
    began, rng = time.monotonic(), random.Random(seed)
    inject = FAULTS[fault][0]
    job = Job(corpus, layout, save, full_disk=inject is None)
    if inject is not None:
        MOMENTS[moment](job, rng)
        steps = _steps_logged(save)
        inject(job, rng)
    status = job.wait()
    if inject is None:
        steps = _steps_logged(save)
        assert status != 0, "a job that could not save ended as if it had"
    starts = 1 + (0 if _is_complete(save) else run_to_its_end(corpus, layout, save))
    last = save / f"iter_{STEPS:07d}"
    same = find_damage(last) is None and hashes(save) == hashes(whole)
    aside = len(list(save.glob("damaged_iter_*")))
    seconds = time.monotonic() - began
    return Outcome(fault, moment, layout, steps, starts, aside, same, seconds)
