"""What the ranks of a dry run found, and all of it on one screen of at most 100 columns."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_let.dry_run.flags import world_size
from megatron_let.planning.memory import GIB, RUNTIME_BYTES

MIB, TERA = 2**20, 1e12
KINDS = ("weights", "gradients", "optimizer", "teacher", "step", "peak")
MOST_COLLECTIVES = 12
UNSEEN = (
    "It can't see numbers, speed, the order in which ranks meet. Transformer\n"
    "Engine's kernels are counted by what they keep (docs/benchmarks.md: how near)."
)


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


def screen(found: Sequence[Found], options: Namespace, said: Sequence[str]) -> str:
    """Return the screen: what each rank found, and what was replaced (`said`)."""
    world = world_size(options)
    tp, pp = options.tensor_model_parallel_size, options.pipeline_model_parallel_size
    seconds = max(one.seconds for one in found)
    lines = [
        f"Dry run of {world} GPU{'s' * (world > 1)} = TP {tp} x PP {pp} x DP {world // (tp * pp)}: "
        f"{len(found)} of its ranks, two steps each on tensors without contents",
        *(f"Replaced: {what}." for what in said),
        "",
        *_memory(found, options.dry_run_gpu_memory),
        "",
        *_work(found),
        "",
        *_collectives(found[0]),
        "",
        f"{seconds:.0f} s a rank. {UNSEEN}",
    ]
    return "\n".join(lines)


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


def _work(found: Sequence[Found]) -> list[str]:
    return [
        f"rank {one.rank:<5}{one.flops / TERA:10.2f} TFLOP a step, the teacher's "
        f"{one.teacher_flops / TERA:.2f} ({one.teacher_flops / max(one.flops, 1):.1%}); the host "
        f"reads {one.reads} values"
        for one in found
    ]


def _collectives(one: Found) -> list[str]:
    if not one.collectives:
        return [f"Rank {one.rank} sends nothing."]
    lines = [f"Collectives of a step on rank {one.rank}, group by group", ""]
    by_bytes = sorted(one.collectives, key=lambda entry: -entry[3])
    for group, kind, number, size in by_bytes[:MOST_COLLECTIVES]:
        lines.append(f"  {group.lower():40}{kind:22}{number:6}{size / MIB:12,.1f} MiB")
    return lines
