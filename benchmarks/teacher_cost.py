"""What a teacher costs a training step, on CPU: overhead, its floor, what is left after the stop.

    .venv/bin/python benchmarks/teacher_cost.py [--pairs 20] [--fast]

In one process group two students of one shape train on the same batches, one with `--method
baseline` and one with `--method let`, step by step in turns, the order changing from pair to pair.
Per pair, as parts of the baseline's step:

    overhead    let - baseline
    measures    how the gradients compare, weight and end that follow it (of a guided step)
    bare        the teacher's forward passes alone, called directly on the rank's share of the rows
    glue        overhead - bare: everything that is ours around the teacher
    floor       teacher forward FLOPs / student forward and backward FLOPs, both counted

and once the stop step is behind, let / baseline, with the teacher calls counted. Medians over the
pairs with 95 % intervals (bootstrap). Required: glue at most 1 %, measures at most 0.5 %, overhead
at most 1.3 x the floor, and zero calls and an interval that holds 1.00 after the stop, with a
teacher about a quarter of the student on one process; with TP=2 the teacher's time per rank at most
0.6 of that at TP=1. A teacher of a tenth is reported too. One thread a process; quiet cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.bootstrap import bounds  # noqa: E402

MAX_GLUE, MAX_OVER_FLOOR, MAX_SPLIT, MAX_MEASURES = 0.01, 1.3, 0.6, 0.005
STUDENT = (
    "--num-layers 8 --hidden-size 512 --num-attention-heads 8 --ffn-hidden-size 1376 --swiglu "
    "--normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
    "--untie-embeddings-and-output-weights --seq-length 256 --max-position-embeddings 256 "
    "--tokenizer-type NullTokenizer --vocab-size 8191 --mock-data --micro-batch-size 1 "
    "--global-batch-size 2 --lr 1e-4 --train-iters 100000 --eval-iters 0 --eval-interval 1000 "
    "--no-create-attention-mask-in-dataloader --let-decay step --let-stop-step 50000 --cpu "
    "--let-weight-rule ratio --guidance-stop cosine --guidance-margin -1"
)
FAST_STUDENT = " --hidden-size 64 --ffn-hidden-size 128 --seq-length 32"
TEACHERS = {"quarter": (8, 256, 688), "tenth": (6, 160, 432)}
"""Layers, width and FFN width; Llama's form, with the student's vocabulary."""


@dataclass
class Measurement:
    """One layout's pairs, and what does not vary. Times in seconds, on the slowest rank."""

    parameters: dict[str, int]
    floor: float
    guided: dict[str, list[float]]
    """`baseline`, `let`, `bare` and `measures` of every pair."""
    stopped: dict[str, list[float]]
    """`baseline` and `let` of every pair after the stop step."""
    calls_after_stop: int


def interval(values: Sequence[float], statistic: Callable[..., np.ndarray] = np.median) -> str:
    """The statistic in percent with its 95 % bootstrap interval."""
    low, high = bounds(values, statistic)
    return f"{100 * statistic(values):6.2f} % [{100 * low:6.2f}, {100 * high:6.2f}]"


def save_teacher(folder: Path, layers: int, width: int, ffn: int) -> Path:
    """Save a teacher with random weights: what it computes costs the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def measure(teacher: Path, tensor_parallel: int, options: argparse.Namespace) -> Measurement:
    """Run the pairs in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(tensor_parallel), str(ROOT / "benchmarks" / "pairs.py")]
        command += (STUDENT + FAST_STUDENT * options.fast).split()
        command += ["--method", "let", "--teacher-model", str(teacher)]
        if tensor_parallel > 1:
            command += ["--tensor-model-parallel-size", str(tensor_parallel), "--sequence-parallel"]
        environment = {"PAIRS": str(options.pairs), "RESULT": str(result), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{done.stdout[-2000:]}{done.stderr[-8000:]}\nthe measurement failed")
        return Measurement(**json.loads(result.read_text()))


def report(name: str, found: Measurement) -> dict[str, float]:
    """Print one layout's block; return what the targets are about."""
    base, let, bare = (np.array(found.guided[key]) for key in ("baseline", "let", "bare"))
    overhead, glue = (let - base) / base, (let - base - bare) / base
    after = np.array(found.stopped["let"]) / np.array(found.stopped["baseline"])
    sizes = ", ".join(f"{key} {value / 1e6:.1f} M" for key, value in found.parameters.items())
    print(f"\n{name}: {sizes}, baseline step {np.median(base):.2f} s, {len(base)} pairs")
    print(f"  overhead         {interval(overhead)}")
    print(f"  bare teacher     {interval(bare / base)}")
    print(f"  glue             {interval(glue)}")
    measures = np.array(found.guided["measures"]) / let
    print(f"  measures         {interval(measures)} of a guided step")
    print(f"  floor (FLOPs)    {100 * found.floor:6.2f} %")
    calls = found.calls_after_stop
    print(f"  after the stop   {interval(after)} of a baseline step, {calls} teacher calls")
    return {
        "overhead": float(np.median(overhead)),
        "glue": float(np.median(glue)),
        "measures": float(np.median(measures)),
        "bare_seconds": float(np.median(bare)),
    }


def misses(found: dict[str, Measurement], figures: dict[str, dict[str, float]]) -> list[str]:
    """The targets that were not met, one sentence each."""
    one, split = figures["quarter, TP=1"], figures["quarter, TP=2"]
    floor, missed = found["quarter, TP=1"].floor, []
    if one["glue"] > MAX_GLUE:
        missed.append(f"glue {one['glue']:.2%} of a step is above {MAX_GLUE:.0%}")
    if one["measures"] > MAX_MEASURES:
        missed.append(f"the measures take {one['measures']:.2%} of a step, not {MAX_MEASURES:.1%}")
    if one["overhead"] > MAX_OVER_FLOOR * floor:
        missed.append(f"overhead is {one['overhead'] / floor:.2f} x the floor, not 1.3 x")
    share = split["bare_seconds"] / one["bare_seconds"]
    if share > MAX_SPLIT:
        missed.append(f"at TP=2 a rank's teacher takes {share:.2f} of TP=1's time, not 0.6")
    for name, measurement in found.items():
        stopped = measurement.stopped
        low, high = bounds(np.array(stopped["let"]) / np.array(stopped["baseline"]))
        if measurement.calls_after_stop or not low <= 1.0 <= high:
            missed.append(f"{name}: after the stop a step is not the baseline's")
    return missed


def main() -> None:
    """Measure, print, and exit non-zero if a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20, help="pairs of steps (default 20)")
    parser.add_argument("--fast", action="store_true", help="a smoke at a tiny size, no targets")
    options = parser.parse_args()
    found, figures = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for size, parallel in (("quarter", 1), ("quarter", 2), ("tenth", 1)):
            name = f"{size}, TP={parallel}"
            teacher = save_teacher(Path(folder) / size, *TEACHERS[size])
            found[name] = measure(teacher, parallel, options)
            figures[name] = report(name, found[name])
    one, split = figures["quarter, TP=1"], figures["quarter, TP=2"]
    missed = [] if options.fast else misses(found, figures)
    over_floor = one["overhead"] / found["quarter, TP=1"].floor
    print(
        f"\noverhead {one['overhead']:.1%} = {over_floor:.2f} x floor, "
        f"glue {one['glue']:.2%}, teacher per rank at TP=2 "
        f"{split['bare_seconds'] / one['bare_seconds']:.2f} of TP=1: "
        + ("; ".join(missed) or "all targets met" * (not options.fast) or "a smoke, no targets")
    )
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
