"""`pretrain_let.py --dry-run`: some ranks of a run, a process each, and what they found."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from megatron_let.dry_run import flags
from megatron_let.errors import UsageError
from megatron_let.planning.memory import GIB, RUNTIME_BYTES
from megatron_let.program import COMMAND, collapsed, environment, named, without

MIB, TERA = 2**20, 1e12
KINDS = ("weights", "gradients", "optimizer", "teacher", "step", "peak")
MOST_COLLECTIVES = 12
LIMITS = (
    "It can't see numbers, speed, the order in which ranks meet. Transformer\n"
    "Engine's kernels are counted by what they keep (docs/benchmarks.md: how near)."
)
FAULT = re.compile(r"(\[rank\d+\]: )?[\w.]+(Error|Exception)\b")  # the last line of a traceback


@dataclass
class Found:
    """What one rank holds, in bytes, and does in its second step."""

    rank: int
    stage: int
    parameters: int = 0
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0  # and what else there is before a step
    teacher: int = 0
    step: int = 0  # at the step's fullest moment, beside what was there before
    flops: float = 0.0
    teacher_flops: float = 0.0
    reads: int = 0
    """How often the host asks for contents of a tensor, which waits for a GPU if it lies there."""
    collectives: list[tuple[str, str, int, int]] = field(default_factory=list)
    """Group, kind, number and bytes of each kind."""
    seconds: float = 0.0

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment of a step."""
        return self.weights + self.gradients + self.optimizer + self.teacher + self.step


def begin() -> None:
    """Run the dry run of this process's command line, and end the process.

    In the process of one of its ranks torch is prepared instead; Megatron must not be there yet.
    """
    if flags.RESULT in os.environ:
        from megatron_let.training.ignored_flags import NEEDS_GPU
        from megatron_let.upstream import cpu, dry

        # What these would do is not seen.
        sys.argv = without(sys.argv, named(NEEDS_GPU))
        cpu.activate()
        dry.before_megatron()
        return
    try:
        if os.environ.get("RANK", "0") == "0":  # one says it for all that torchrun has started
            found, said = found_by(sys.argv[1:])
            print(screen(found, flags.parse(sys.argv[1:]), said))
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
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    running: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory(prefix="dry-run-") as name:
        folder = Path(name)
        own, said = flags.replaced(words, options, folder)
        command = [*COMMAND, *collapsed(own)]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            try:
                found = pool.map(lambda rank: _rank(command, rank, world, folder, running), chosen)
                return list(found), said
            finally:  # a rank that failed, or a signal, ends all
                for process in running:
                    process.kill()


def _rank(
    command: list[str], rank: int, world: int, folder: Path, running: list[subprocess.Popen[str]]
) -> Found:
    """Run one rank in a process of its own, which is noted among those `running`."""
    result = folder / f"{rank}.json"
    own = environment(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="nowhere", MASTER_PORT="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="",
        **{flags.RESULT: str(result)},
    )  # fmt: skip
    process = subprocess.Popen(
        command, env=own, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
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


def screen(found: Sequence[Found], options: Namespace, said: Sequence[str]) -> str:
    """Return the screen: what each rank found, and what was replaced (`said`)."""
    world = flags.world_size(options)
    tp, pp = options.tensor_model_parallel_size, options.pipeline_model_parallel_size
    lines = [
        f"Dry run of {world} GPU{'s' * (world > 1)} = TP {tp} x PP {pp} x DP {world // (tp * pp)}: "
        f"{len(found)} of its ranks, two steps each on tensors without contents",
        *(f"Replaced: {what}." for what in said),
        "",
        *_memory(found, options.dry_run_gpu_memory),
        "",
    ]
    lines += [
        f"rank {one.rank:<5}{one.flops / TERA:10.2f} TFLOP a step, the teacher's "
        f"{one.teacher_flops / TERA:.2f} ({one.teacher_flops / max(one.flops, 1):.1%}); the host "
        f"reads {one.reads} values"
        for one in found
    ]
    first, sent = found[0].rank, sorted(found[0].collectives, key=lambda entry: -entry[3])
    title = f"Collectives of a step on rank {first}, group by group\n"
    lines += ["", title if sent else f"Rank {first} sends nothing."]
    lines += [
        f"  {group.lower():40}{kind:22}{number:6}{size / MIB:12,.1f} MiB"
        for group, kind, number, size in sent[:MOST_COLLECTIVES]
    ]
    seconds = max(one.seconds for one in found)
    return "\n".join([*lines, "", f"{seconds:.0f} s a rank. {LIMITS}"])


def _memory(found: Sequence[Found], gpu_gib: float) -> list[str]:
    lines = ["GiB       " + "".join(f"{kind:>10}" for kind in KINDS) + "  parameters"]
    for one in found:
        sizes = "".join(f"{getattr(one, kind) / GIB:10.2f}" for kind in KINDS)
        lines.append(f"rank {one.rank:<5}{sizes}  {one.parameters:,} (stage {one.stage})")
    fullest = max(found, key=lambda one: one.peak)
    need = (fullest.peak + RUNTIME_BYTES) / GIB
    verdict = "Fits" if need <= gpu_gib else "DOES NOT FIT"
    lines.append(
        f"{verdict}: rank {fullest.rank} needs {need:.1f} GiB of {gpu_gib:g} "
        f"({RUNTIME_BYTES / GIB:.0f} of them for CUDA, NCCL and fragments)"
    )
    return lines
