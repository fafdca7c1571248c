"""Compare `pretrain_let.py --method baseline` with Megatron-LM's own `pretrain_gpt.py`, on CPU.

    git clone --branch core_v0.19.0 --depth 1 https://github.com/NVIDIA/Megatron-LM ~/Megatron-LM
    .venv/bin/python benchmarks/against_upstream.py --megatron-lm ~/Megatron-LM [--nproc 4]

Both train the same small model with the same flags on the same made-up data, on the same installed
megatron-core and under the same CPU platform, so what differs is the two entry scripts. Required:
the same training and validation losses and gradient norms, to the last bit of their fp32 values,
the same sha256 of the final weights, and a step time of at most 1.01 times upstream's. Dropout is
on, so one random number more or less would show.

The two run at the same time and take turns, one step each (`turns.py`), so that the machine's moods
hit both; a turn holds all that a program does from one step's beginning to the next one's. The
ratio is the median over the steps of ours / upstream, with its 95 % interval (bootstrap), without
the first steps.
"""

import argparse
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

from benchmarks.bootstrap import bounds  # noqa: E402
from megatron_let.checkpoint.folder import find_checkpoint  # noqa: E402
from megatron_let.checkpoint.reader import Checkpoint  # noqa: E402
from megatron_let.errors import UsageError  # noqa: E402

TAG = "core_v0.19.0"
CHECKOUT_SHA256 = {
    "pretrain_gpt.py": "7283c4aeb5a00c694bbf2930527a184fc0d5f607f548c74707c71cc240d05fae",
    "gpt_builders.py": "cf4b409d598cd2bbba52edf41f2f772dd59cde741e093fe52c41a2acf9a8ea7b",
    "model_provider.py": "8486f2047dd2bd23c82900ac8d0580270d810f1ac6bf3207260d79ac1460e227",
}
"""The files that are used of a checkout, as they are at `TAG`."""

MAX_RATIO = 1.01
WARM_UP = 3
LAYOUTS = {
    1: "",
    4: "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel",
}
MODEL = (
    "--num-layers 4 --hidden-size {hidden} --num-attention-heads 4 --ffn-hidden-size {ffn} "
    "--swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
    "--untie-embeddings-and-output-weights --max-position-embeddings 128 "
    "--tokenizer-type NullTokenizer --vocab-size 2047 --mock-data"
)
TRAINING = (
    "--seq-length 128 --micro-batch-size 2 --global-batch-size 8 --lr 1e-3 --seed 1234 "
    "--train-iters {steps} --eval-iters 1 --eval-interval {half} --log-interval 1 "
    "--num-workers 0 --no-save-optim --no-save-rng --save-interval {steps} --save {folder} "
    "--data-cache-path {folder}/cache --tensorboard-dir {folder}/tensorboard "
    "--log-timers-to-tensorboard"
)
WIDTH, FAST_WIDTH = 256, 64
COMPARED = ("lm loss", "grad-norm", "lm loss validation")


@dataclass
class Outcome:
    """What one run left behind."""

    values: dict[str, list[float]]
    """Losses and gradient norms as they were logged, in order."""
    milliseconds: list[float]
    """Time of each step after the warm-up."""
    weights: str
    """The sha256 of the final weights."""


def parse_arguments() -> argparse.Namespace:
    """Parse the command line and check the checkout."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--megatron-lm", type=Path, required=True, metavar="PATH", help=f"a checkout of {TAG}"
    )
    parser.add_argument(
        "--nproc", type=int, default=1, choices=LAYOUTS, help="4 is TP 2 x PP 2 with SP (default 1)"
    )
    parser.add_argument("--steps", type=int, default=100, help="of each (default %(default)s)")
    parser.add_argument(
        "--fast", action="store_true", help="6 tiny steps; the ratio is shown but not judged"
    )
    args = parser.parse_args()
    if args.fast:
        args.steps = 6
    if args.steps < 6:
        parser.error("--steps must be at least 6")
    check_checkout(args.megatron_lm)
    return args


def check_checkout(path: Path) -> None:
    """Check that the files used are those of the tag, unchanged.

    The version in `megatron/core/package_info.py` cannot tell: the tag stands on the commit that
    raises it to 0.19.1.

    Raises:
        UsageError: a file is missing or differs.
    """
    for name, expected in CHECKOUT_SHA256.items():
        file = path / name
        if not file.is_file() or not (path / "megatron" / "core").is_dir():
            raise UsageError(
                f"{path} is not a checkout of Megatron-LM: there is no {name} with megatron/core "
                "beside it. Get one: git clone --branch "
                f"{TAG} --depth 1 https://github.com/NVIDIA/Megatron-LM {path}"
            )
        if hashlib.sha256(file.read_bytes()).hexdigest() != expected:
            raise UsageError(
                f"{file} is not the one of {TAG}: another version, or changed. "
                f"Run: git -C {path} checkout {TAG} -- {name}"
            )


# ----------------------------------------------------------------------------------------------
# One run
# ----------------------------------------------------------------------------------------------


def flags(args: argparse.Namespace, folder: Path) -> list[str]:
    """Return the flags that both programs get."""
    width = FAST_WIDTH if args.fast else WIDTH
    model = MODEL.format(hidden=width, ffn=8 * width // 3 // 4 * 4)
    training = [
        word.format(steps=args.steps, half=args.steps // 2, folder=folder)
        for word in TRAINING.split()
    ]
    return [*model.split(), *LAYOUTS[args.nproc].split(), *training]


def train_both(args: argparse.Namespace, folder: Path) -> tuple[Outcome, Outcome]:
    """Train with both programs in turns; return ours and upstream's outcome.

    Raises:
        UsageError: a run failed; with the end of its log.
    """
    for side in ("0", "1"):
        os.mkfifo(folder / side)
    upstream = [str(ROOT / "benchmarks" / "run_upstream.py"), str(args.megatron_lm.resolve())]
    ours = [str(ROOT / "benchmarks" / "run_ours.py"), "--cpu", "--method", "baseline"]
    processes = {
        name: start(program + flags(args, folder / name), folder, side, args.nproc)
        for side, (name, program) in enumerate({"upstream": upstream, "ours": ours}.items())
    }
    try:
        wait_for(processes, folder)
    finally:
        for process in processes.values():
            process.terminate()  # torchrun ends its workers then; nothing happens if it has ended
            process.wait()
    outcomes = [
        read_outcome(folder / name, folder / f"{side}.json", args.steps)
        for side, name in enumerate(processes)
    ]
    return outcomes[1], outcomes[0]


def start(program: list[str], folder: Path, side: int, nproc: int) -> subprocess.Popen[bytes]:
    """Start one of the two programs, its output going to `{side}.log`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(nproc), *program]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"TURNS_FOLDER": str(folder), "TURNS_SIDE": str(side)}
    with (folder / f"{side}.log").open("w") as log:
        return subprocess.Popen(
            command, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT
        )


def wait_for(processes: dict[str, subprocess.Popen[bytes]], folder: Path) -> None:
    """Wait until both have ended.

    Raises:
        UsageError: one has failed; the other one would wait for it for ever.
    """
    while any(process.poll() is None for process in processes.values()):
        for side, (name, process) in enumerate(processes.items()):
            if process.returncode:
                log = (folder / f"{side}.log").read_text()
                raise UsageError(
                    f"{name}: exit status {process.returncode}; its log ends:\n{log[-3000:]}"
                )
        time.sleep(0.2)


def read_outcome(folder: Path, times: Path, steps: int) -> Outcome:
    """Read a run's losses and step times, and the hash of its final weights."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    values = {name: [event.value for event in events.Scalars(name)] for name in COMPARED}
    assert len(values["lm loss"]) == steps, folder
    seconds = json.loads(times.read_text())
    assert len(seconds) == steps - 1, folder  # the last step has no next one
    weights = hash_weights(find_checkpoint(folder))
    return Outcome(values, [1000 * second for second in seconds[WARM_UP:]], weights)


def hash_weights(folder: Path) -> str:
    """Return the sha256 over names, types, shapes and bytes of all tensors of a checkpoint."""
    checkpoint = Checkpoint(folder)
    digest = hashlib.sha256()
    for name in sorted(name for name in checkpoint.names if "/shard_" not in name):  # no objects
        tensor = checkpoint.read(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------
# The comparison
# ----------------------------------------------------------------------------------------------


def first_difference(ours: Outcome, upstream: Outcome) -> str:
    """Name the first logged value, or the weights, that differ; empty if all is equal."""
    for name in COMPARED:
        pairs = list(zip(ours.values[name], upstream.values[name], strict=True))
        for index, (mine, other) in enumerate(pairs, start=1):
            if mine != other:
                return f"{name}, {index} of {len(pairs)}: {mine!r} and {other!r}"
    return "" if ours.weights == upstream.weights else "final weights"


def compare(args: argparse.Namespace, folder: Path) -> int:
    """Run both, print the summary; returns the exit status."""
    ours, upstream = train_both(args, folder)
    ratios = [a / b for a, b in zip(ours.milliseconds, upstream.milliseconds, strict=True)]
    medians = [statistics.median(outcome.milliseconds) for outcome in (ours, upstream)]
    print(f"median step: ours {medians[0]:.1f} ms, upstream {medians[1]:.1f} ms")
    print(f"final weights: ours {ours.weights[:16]}, upstream {upstream.weights[:16]}")
    return summarize(args, ratios, first_difference(ours, upstream))


def summarize(args: argparse.Namespace, ratios: list[float], difference: str) -> int:
    """Print the last line; returns the exit status."""
    ratio, (low, high) = statistics.median(ratios), bounds(ratios)
    slow = ratio > MAX_RATIO and not args.fast
    layout = "TP 2 x PP 2 + SP" if args.nproc == 4 else "1 process"
    equal = f"DIFFERENT {difference}" if difference else "identical losses and weights"
    print(
        f"{'FAILED' if slow or difference else 'ok'}: {layout}, {args.steps} steps: {equal}; step "
        f"time {ratio:.4f} x upstream's ({low:.4f} to {high:.4f}, {len(ratios)} pairs of steps; "
        f"at most {MAX_RATIO}{', not judged' if args.fast else ''})"
    )
    return int(bool(slow or difference))


def main() -> int:
    """Compare the two programs."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and clean up
    try:
        args = parse_arguments()
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="against-upstream-") as folder:
            status = compare(args, Path(folder))
        print(f"({time.perf_counter() - started:.0f} s)", file=sys.stderr)
        return status
    except UsageError as error:
        print(f"against_upstream.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
