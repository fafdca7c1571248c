"""`pretrain_let.py --dry-run`: some ranks of a run, a process each, and what they found."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_let.dry_run import flags
from megatron_let.dry_run.screen import Found, screen
from megatron_let.errors import UsageError
from megatron_let.program import COMMAND, environment

FAULT = re.compile(r"(\[rank\d+\]: )?[\w.]+(Error|Exception)\b")  # the last line of a traceback


def begin() -> None:
    """Run the dry run of this process's command line, and end the process.

    In the process of one of its ranks torch is prepared instead; Megatron must not be there yet.
    """
    if flags.RESULT in os.environ:
        from megatron_let.training.ignored_flags import NEEDS_GPU
        from megatron_let.upstream import cpu, dry

        # What these would do is not seen.
        sys.argv = flags.without(sys.argv, flags.named(NEEDS_GPU))
        cpu.activate()
        dry.before_megatron()
        return
    try:
        if os.environ.get("RANK", "0") == "0":  # one says it for all that torchrun has started
            words = sys.argv[1:]
            found, said = found_by(words)
            print(screen(found, flags.parse(words), said))
    except UsageError as error:
        print(f"pretrain_let.py: error: {error}", file=sys.stderr)
        sys.exit(error.status)
    sys.exit()


def found_by(words: Sequence[str]) -> tuple[list[Found], list[str]]:
    """Run some ranks of the run that a command line, without the program, describes.

    Returns what each found, and what was replaced, a sentence each. Raises UsageError if it cannot
    be run dry, or in the words of a rank that ended in an error.
    """
    options = flags.parse(words)
    world = flags.world_size(options)
    chosen = flags.ranks(options, world)
    flags.refuse_unseen(options)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    running: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory(prefix="dry-run-") as name:
        folder = Path(name)
        own, said = flags.replaced(words, options, folder)
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            try:
                found = pool.map(lambda rank: _rank(own, rank, world, folder, running), chosen)
                return list(found), said
            finally:  # a rank that failed, or a signal, ends all
                for process in running:
                    process.kill()


def _rank(
    words: list[str], rank: int, world: int, folder: Path, running: list[subprocess.Popen[str]]
) -> Found:
    """Run one rank in a process of its own, which is noted among those `running`."""
    result = folder / f"{rank}.json"
    own = environment(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="nowhere", MASTER_PORT="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="",
        **{flags.RESULT: str(result)},
    )  # fmt: skip
    process = subprocess.Popen(
        [*COMMAND, *words], env=own, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    running.append(process)
    _, errors = process.communicate()
    if process.returncode or not result.exists():
        reason = _reason(errors) or f"The process ended with status {process.returncode}."
        own_teacher = f"{folder}/"  # which the user has called by its name alone
        raise UsageError(f"{reason.replace(own_teacher, '')} (rank {rank} of {world})")
    return Found(**json.loads(result.read_text()))


def _reason(stderr: str) -> str:
    """The error that a process ended with, in its words."""
    lines = [line for line in stderr.strip().splitlines() if line.strip()]
    errors = [line for line in lines if ": error: " in line]
    if errors:
        return errors[-1].partition(": error: ")[2]
    faults = [line for line in lines if FAULT.match(line)]
    return f"The run ends with {(faults or lines)[-1]}" if lines else ""
