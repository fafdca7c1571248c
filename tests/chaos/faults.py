"""Faults that befall a training job, and what must come of them: the state of an undisturbed run.

Every fault has a small LET run of its own: it is hit once, started again as often as it needs, and
compared with the undisturbed run, all that the last checkpoint holds. A fault says what it has hit,
or that it missed: then it is drawn again, and a third miss is a failure.
"""

import contextlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_let.checkpoint.choice import find_damage
from megatron_let.checkpoint.folder import SUMS, TRACKER
from megatron_let.checkpoint.folder import differing as differing_from_sums
from tests.chaos.compare import differing
from tests.chaos.jobs import Job
from tests.support.disk import small_disk
from tests.support.tiny_run import FLAGS, Corpus

STEPS, INTERVAL = 16, 4
RUN = (
    f"--train-iters {STEPS} --save-interval {INTERVAL} --eval-interval {INTERVAL // 2} "
    "--eval-iters 1 --hidden-dropout 0.1 --exit-signal-handler --save-keep-last 2 "
    "--distributed-timeout-minutes 1"
).split()
LET = f"--let-stop-step {STEPS // 2}".split()
WRITER = "--async-save --use-persistent-ckpt-worker --async-strategy mcore"
LAYOUTS = {
    "DP 2": (2, ""),
    "DP 2, ZeRO-1, verified": (2, "--use-distributed-optimizer --verify-integrity"),
    "TP 2, SP": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "PP 2": (2, "--pipeline-model-parallel-size 2"),
    "DP 2, async": (2, WRITER),
    "PP 2, ZeRO-1, async": (
        2,
        f"{WRITER} --pipeline-model-parallel-size 2 --use-distributed-optimizer",
    ),
    "TP 2, PP 2, SP": (
        4,
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel",
    ),
}
"""Ranks and flags; the first's are the defaults."""
MAX_STARTS, MAX_DRAWS = 6, 3
START_SECONDS = 4
"""A fault at start-up comes within this after the first rank is there."""
FULL_DISK_BYTES = 100_000
"""Largest file that a job on a full disk can write; a checkpoint's are larger."""
TMPFS_BYTES = 1_600_000
"""Room for one checkpoint and what lies beside it, not for three."""


class Missed(Exception):
    """The fault came too late, or found nothing to hit."""


@dataclass
class Victim:
    """A run that something is about to befall."""

    job: Job
    save: Path
    rng: random.Random

    def steps(self) -> int:
        """How many are logged."""
        metrics = self.save / "metrics.jsonl"
        return metrics.read_text().count('"kind": "train"') if metrics.exists() else 0

    def is_complete(self) -> bool:
        """Whether the run has noted its end."""
        return is_complete(self.save)

    def a_rank(self) -> psutil.Process:
        """One that lives, of the job that is not complete yet."""
        ranks = self.job.ranks()
        if not ranks or self.is_complete():
            raise Missed("no rank is there")
        return self.rng.choice(ranks)


def is_complete(save: Path) -> bool:
    """Whether a run has noted its end."""
    metrics = save / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return bool(lines) and '"kind": "end"' in lines[-1]


# --- when --------------------------------------------------------------------------------------


def at_start(victim: Victim) -> None:
    """While it imports, builds data or sets up its groups."""
    victim.job.wait_for(lambda: bool(victim.job.ranks()))
    time.sleep(victim.rng.uniform(0, START_SECONDS))
    if victim.steps():
        raise Missed("it has started")


def in_training(victim: Victim) -> None:
    """After some steps, perhaps in an evaluation or a save."""
    wanted = victim.rng.randint(INTERVAL + 1, STEPS - 2)
    if not victim.job.wait_for(lambda: victim.steps() >= wanted) or victim.is_complete():
        raise Missed("it has ended")


def late(victim: Victim) -> None:
    """When there are two checkpoints, and sums of the newest."""

    def ready() -> bool:
        tracked = _tracked(victim.save)
        return tracked > INTERVAL and (_folder(victim.save, tracked) / SUMS).exists()

    if not victim.job.wait_for(ready) or victim.is_complete():
        raise Missed("it has ended")


POINTS = {
    "data building": ("data", (0,)),
    "evaluation": ("evaluation", (1, 3, 5)),
    "a save, before a file": ("write", (0, 1, 2)),
    "a save, behind a file": ("written", (0, 1, 2)),
    "before the tracker": ("tracker before", (0, 1, 2)),
    "in the tracker": ("tracker torn", (0, 1, 2)),
    "behind the tracker": ("tracker after", (0, 1, 2)),
    "removal": ("removal", (0,)),
    "half of a removal": ("half removed", (0,)),
    "before the sums": ("sums", (0, 1, 2)),
}
"""Moments at a point of `points.py`: its name, and how often it may be passed before."""
MOMENTS: dict[str, Callable[[Victim], None]] = {
    "start": at_start,
    "training": in_training,
    "late": late,
}


def at_point(victim: Victim) -> None:
    """When a rank has come to the point, where it waits."""
    if not victim.job.wait_for((victim.job.folder / "mark-there").exists):
        raise Missed("no rank came there")


# --- what --------------------------------------------------------------------------------------


def kill_a_rank(victim: Victim) -> None:
    """SIGKILL one rank; torchrun must end the others."""
    rank = victim.a_rank()
    rank.kill()
    status = victim.job.wait()
    if f"(pid: {rank.pid})" not in victim.job.log() or not status:
        raise Missed(f"torchrun ended with {status}, not for rank process {rank.pid}")


def kill_all(victim: Victim) -> None:
    """SIGKILL torchrun and every rank."""
    victim.a_rank()
    if victim.job.kill() < 3 or victim.job.wait() >= 0:
        raise Missed("it had ended")


def terminate(victim: Victim) -> None:
    """SIGTERM, as a scheduler sends it before the time limit; a save must come of it."""
    victim.a_rank()
    was_training = "training ..." in victim.job.log()
    victim.job.process.terminate()
    (victim.job.folder / "mark-go").touch()
    victim.job.wait()
    if victim.is_complete():
        raise Missed("it was at its end")
    assert not was_training or "exiting program after receiving SIGTERM" in victim.job.log()


def pause_a_rank(victim: Victim) -> None:
    """SIGSTOP one rank for some seconds; nothing comes of it."""
    rank = victim.a_rank()
    _stop(rank)
    time.sleep(victim.rng.uniform(1, 5))
    assert rank.status() == psutil.STATUS_STOPPED, rank.status()
    rank.resume()
    assert victim.job.wait() == 0, "a pause ended the run"


def hang_a_rank(victim: Victim) -> None:
    """SIGSTOP one rank for good; the others must give up waiting, and torchrun must end the job."""
    rank = victim.a_rank()
    _stop(rank)
    if victim.job.wait() == 0:
        raise Missed("it was at its end")


def _stop(rank: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        rank.suspend()
        for _ in range(100):
            if rank.status() == psutil.STATUS_STOPPED:
                return
            time.sleep(0.01)
    raise Missed("the rank has ended")


def cut_a_file(victim: Victim) -> None:
    """Kill the job and cut a file of its newest checkpoint."""
    path = _file_of_the_newest(victim)
    size = path.stat().st_size
    os.truncate(path, victim.rng.randrange(size))
    assert path.stat().st_size < size


def flip_a_bit(victim: Victim) -> None:
    """Kill the job and flip a bit of its newest checkpoint."""
    path = _file_of_the_newest(victim)
    before = path.read_bytes()
    content = bytearray(before)
    content[victim.rng.randrange(len(content))] ^= 1 << victim.rng.randrange(8)
    path.write_bytes(content)
    assert path.read_bytes() != before


def _file_of_the_newest(victim: Victim) -> Path:
    victim.a_rank()
    victim.job.kill()
    folder = _folder(victim.save, _tracked(victim.save))
    if not (folder / SUMS).exists():
        raise Missed("the newest checkpoint has no sums yet")
    summed = json.loads((folder / SUMS).read_text())["files"]  # not what is left of making them
    return folder / victim.rng.choice(sorted(summed))


def _tracked(save: Path) -> int:
    text = (save / TRACKER).read_text() if (save / TRACKER).is_file() else ""
    return int(text) if text.isdecimal() else 0


def _folder(save: Path, step: int) -> Path:
    return save / f"iter_{step:07d}"


def fill_the_disk(victim: Victim) -> None:
    """The job's disk is full in a save: it must end, and say why."""
    assert victim.job.wait() != 0, "a job that could not save ended as if it had"
    said = [line for line in victim.job.log().splitlines() if "pretrain_let.py: error: " in line]
    assert any(f"written to {victim.save}" in line or "cannot be written" in line for line in said)


Inject = Callable[[Victim], None]
KILLED_AT = tuple(POINTS)
FAULTS: dict[str, tuple[Inject, tuple[str, ...]]] = {
    "kill a rank": (kill_a_rank, ("start", "training", *KILLED_AT)),
    "kill all": (kill_all, ("start", "training", *KILLED_AT)),
    "TERM": (terminate, ("start", "training", "data building", "evaluation", "before the tracker")),
    "pause a rank": (pause_a_rank, ("training",)),
    "hang a rank": (hang_a_rank, ("training",)),
    "cut a file": (cut_a_file, ("late",)),
    "flip a bit": (flip_a_bit, ("late",)),
    "kill all, tracker": (kill_all, ("before the tracker", "in the tracker", "behind the tracker")),
    "kill all, removal": (kill_all, ("removal", "half of a removal")),
    "disk full": (fill_the_disk, ("save",)),  # a file can't grow; it needs nobody to inject it
    "tmpfs full": (fill_the_disk, ("save",)),
}
"""What happens and when."""


@dataclass(frozen=True)
class Outcome:
    """What came of one fault."""

    fault: str
    moment: str
    layout: str
    steps_before: int
    """Logged when the fault had struck."""
    starts: int
    """Of the run in all."""
    put_aside: int
    """Checkpoints that were found damaged."""
    struck: bool
    draws: int
    """Until it struck."""
    differing: list[str]
    """What of the last checkpoint is not the undisturbed run's."""
    seconds: float

    @property
    def survived(self) -> bool:
        """It struck, and the run ended as if it had not."""
        return self.struck and not self.differing


def start(corpus: Corpus, layout: str, save: Path, jobs: Path, **options: object) -> Job:
    """Start a run, or go on with it."""
    processes, flags = LAYOUTS[layout]
    argv = [*FLAGS, *RUN, *flags.split(), *corpus.flags, *corpus.let(*LET), "--save", str(save)]
    argv += ["--load", str(save)]  # at the first start too, as a job that may go back to the queue
    return Job(processes, argv, jobs, **options)  # type: ignore[arg-type]


def run_to_its_end(corpus: Corpus, layout: str, save: Path, jobs: Path) -> int:
    """Start the run until it is complete; returns how many starts it took.

    Raises:
        RuntimeError: it does not get on.
    """
    for count in range(1, MAX_STARTS + 1):
        start(corpus, layout, save, jobs).wait()
        if is_complete(save):
            return count
    raise RuntimeError(f"not complete after {MAX_STARTS} starts: {jobs / 'log.txt'}")


def befall(
    corpus: Corpus, layout: str, fault: str, moment: str, folder: Path, seed: int, whole: Path
) -> Outcome:
    """Run with a fault until it strikes, go on to the end, compare with the undisturbed `whole`."""
    began = time.monotonic()
    for draw in range(1, MAX_DRAWS + 1):
        shutil.rmtree(folder, ignore_errors=True)
        save = folder / "run"
        save.mkdir(parents=True)
        rng = random.Random(f"{seed}/{draw}")
        is_small = fault == "tmpfs full"
        with small_disk(save, TMPFS_BYTES) if is_small else nullcontext(int) as make_room:
            victim = _strike(corpus, layout, fault, moment, folder, rng)
            if victim is None:
                continue
            make_room()
            steps, starts = victim.steps(), 1
            if not victim.is_complete():
                starts += run_to_its_end(corpus, layout, save, folder)
            last = _folder(save, STEPS)
            damage = differing_from_sums(last) or find_damage(last)
            found = [damage] if damage else differing(save, whole)
            aside = len(list(save.glob("damaged_iter_*")))
            is_damaged = fault in ("cut a file", "flip a bit")
            struck = not is_damaged or aside > 0
        seconds = time.monotonic() - began
        return Outcome(
            fault, moment, layout, steps, starts, aside, struck, draw, found[:9], seconds
        )
    seconds = time.monotonic() - began
    return Outcome(fault, moment, layout, 0, 0, 0, False, MAX_DRAWS, [], seconds)


def _strike(
    corpus: Corpus, layout: str, fault: str, moment: str, folder: Path, rng: random.Random
) -> Victim | None:
    """Start a run and have the fault strike it; None if it missed."""
    options: dict[str, object] = {}
    if fault == "disk full":
        options["largest_file"] = FULL_DISK_BYTES
    if moment in POINTS:
        name, passes = POINTS[moment]
        options["point"] = f"{name}:{rng.choice(passes)}"
    victim = Victim(start(corpus, layout, folder / "run", folder, **options), folder / "run", rng)
    try:
        if moment != "save":
            MOMENTS.get(moment, at_point)(victim)
        FAULTS[fault][0](victim)
    except Missed as miss:
        victim.job.kill()
        print(f"    missed: {miss}", flush=True)
        return None
    return victim
