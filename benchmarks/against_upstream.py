"""Compare `pretrain_let.py --method baseline` with Megatron-LM's own `pretrain_gpt.py`, on CPU.

    git clone --branch core_v0.19.0 --depth 1 https://github.com/NVIDIA/Megatron-LM ~/Megatron-LM
    .venv/bin/python benchmarks/against_upstream.py --megatron-lm ~/Megatron-LM [--nproc 4]

Both train the same small model with the same flags on the same made-up data, on the same installed
megatron-core and under the same CPU platform, so what differs is the two entry scripts. Required:
the same training and validation losses and gradient norms, to the last bit of their fp32 values,
the same sha256 of the final weights, and a step time of at most 1.01 times upstream's. Dropout is
on, so one random number more or less would show.

Step times are Megatron's own (`iteration-time`, from one step's log to the next one's) without the
first steps. The two programs run in turns and the order alternates; a pair's ratio is that of the
two medians over steps. Times on a busy machine mean little: the spread is printed.
"""

import argparse
import hashlib
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

from megatron_let.conversion.checkpoint import Checkpoint, find_checkpoint  # noqa: E402
from megatron_let.errors import UsageError  # noqa: E402

TAG = "core_v0.19.0"
CHECKOUT_SHA256 = {
    "pretrain_gpt.py": "7283c4aeb5a00c694bbf2930527a184fc0d5f607f548c74707c71cc240d05fae",
    "gpt_builders.py": "cf4b409d598cd2bbba52edf41f2f772dd59cde741e093fe52c41a2acf9a8ea7b",
    "model_provider.py": "8486f2047dd2bd23c82900ac8d0580270d810f1ac6bf3207260d79ac1460e227",
}
"""The files that are used of a checkout, as they are at `TAG`."""

MAX_RATIO = 1.01
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
    milliseconds: float
    """Median time of a step after the warm-up."""
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
    parser.add_argument("--steps", type=int, default=20, help="of each run (default %(default)s)")
    parser.add_argument("--pairs", type=int, default=5, help="of runs (default %(default)s)")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="one pair of 6 tiny steps; the ratio is shown but not judged",
    )
    args = parser.parse_args()
    if args.fast:
        args.steps, args.pairs = 6, 1
    if args.steps < 4 or args.pairs < 1:
        parser.error("--steps must be at least 4 and --pairs at least 1")
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


def train(program: str, args: argparse.Namespace, folder: Path) -> Outcome:
    """Train with one of the two programs.

    Raises:
        UsageError: the run failed; with the end of its log.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(args.nproc)]
    if program == "ours":
        command += [str(ROOT / "pretrain_let.py"), "--cpu", "--method", "baseline"]
    else:
        command += [str(ROOT / "benchmarks" / "run_upstream.py"), str(args.megatron_lm.resolve())]
    folder.mkdir(parents=True)
    log = folder / "log.txt"
    code = call(command + flags(args, folder), log)
    if code != 0:
        raise UsageError(f"{program}: exit status {code}; its log ends:\n{log.read_text()[-3000:]}")
    return read_outcome(folder, args.steps)


def call(command: list[str], log: Path) -> int:
    """Run a command to its end, or, when this program is stopped, to a clean end of its workers."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        return process.wait()
    finally:
        process.terminate()  # torchrun ends its workers then; nothing happens if it has ended
        process.wait()


def read_outcome(folder: Path, steps: int) -> Outcome:
    """Read a run's losses and step times, and the hash of its final weights."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    values = {name: [event.value for event in events.Scalars(name)] for name in COMPARED}
    assert len(values["lm loss"]) == steps, folder
    warm_up = max(2, steps // 4)
    seconds = [event.value for event in events.Scalars("iteration-time") if event.step > warm_up]
    assert len(seconds) == steps - warm_up, folder
    weights = hash_weights(find_checkpoint(folder))
    return Outcome(values, 1000 * statistics.median(seconds), weights)


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


def train_pair(index: int, args: argparse.Namespace, folder: Path) -> tuple[Outcome, Outcome]:
    """Run both programs one after the other; returns ours and upstream's outcome."""
    order = ("upstream", "ours") if index % 2 == 0 else ("ours", "upstream")
    outcomes = {program: train(program, args, folder / f"{index}-{program}") for program in order}
    return outcomes["ours"], outcomes["upstream"]


def first_difference(ours: Outcome, upstream: Outcome) -> str:
    """Name the first logged value, or the weights, that differ; empty if all is equal."""
    for name in COMPARED:
        pairs = list(zip(ours.values[name], upstream.values[name], strict=True))
        for index, (mine, other) in enumerate(pairs, start=1):
            if mine != other:
                return f"{name}, {index} of {len(pairs)}: {mine!r} and {other!r}"
    return "" if ours.weights == upstream.weights else "final weights"


def compare(args: argparse.Namespace, folder: Path) -> int:
    """Run all pairs, print the table and the summary; returns the exit status."""
    print(f"{'pair':>4} {'ours':>10} {'upstream':>10} {'ratio':>7}  losses and weights", flush=True)
    ratios, differences = [], []
    for index in range(args.pairs):
        ours, upstream = train_pair(index, args, folder)
        ratios.append(ours.milliseconds / upstream.milliseconds)
        difference = first_difference(ours, upstream)
        differences += [difference] if difference else []
        print(
            f"{index + 1:4} {ours.milliseconds:7.1f} ms {upstream.milliseconds:7.1f} ms "
            f"{ratios[-1]:7.4f}  "
            + (f"DIFFERENT: {difference}" if difference else f"equal, sha256 {ours.weights[:16]}"),
            flush=True,
        )
    return summarize(args, ratios, differences)


def summarize(args: argparse.Namespace, ratios: list[float], differences: list[str]) -> int:
    """Print the last line; returns the exit status."""
    ratio = statistics.median(ratios)
    slow = ratio > MAX_RATIO and not args.fast
    layout = "TP 2 x PP 2 + SP" if args.nproc == 4 else "1 process"
    equal = "DIFFERENT losses or weights" if differences else "identical losses and weights"
    print(
        f"{'FAILED' if slow or differences else 'ok'}: {layout}, {args.steps} steps: {equal}; step "
        f"time {ratio:.4f} x upstream's ({min(ratios):.4f} to {max(ratios):.4f}, "
        f"{args.pairs} pairs; at most {MAX_RATIO}{', not judged' if args.fast else ''})"
    )
    return int(bool(slow or differences))


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
