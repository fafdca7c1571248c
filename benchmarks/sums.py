"""What training waits for the sums of its checkpoints' files, on CPU.

    .venv/bin/python benchmarks/sums.py [--pairs 150] [--hidden 384]

One run of `pretrain_let.py` saves, then trains with the files of its checkpoint being summed in
the background in every second step, again and again, by the thread of
`megatron_let/checkpoint/sums.py`.
Neighbours are compared, so that the machine's moods hit both:

    slower      a step with sums over one without, minus 1: median of the pairs, 95 % (bootstrap)
    waits       slower x the time to sum a checkpoint once, in parts of the time of a save

Required: waits at most 2 %, the interval's upper end too. One thread a process, so that a second
core is there for the sums, as a training node has them. Megatron's own way is given beside it: rank
0 sums while training waits.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.bootstrap import bounds  # noqa: E402

WARM_UP = 4
PIECE = 8 << 20
"""Bytes; so small that no sum reaches into the next step."""
MAX_WAIT = 2.0
"""Per cent of a save."""
FLAGS = (
    "--cpu --num-layers 8 --num-attention-heads 8 --swiglu --normalization RMSNorm "
    "--disable-bias-linear --position-embedding-type rope --seq-length 128 "
    "--untie-embeddings-and-output-weights --max-position-embeddings 128 --micro-batch-size 1 "
    "--global-batch-size 1 --tokenizer-type NullTokenizer --vocab-size 2047 --mock-data --lr 1e-4 "
    f"--eval-interval 100000 --eval-iters 0 --num-workers 0 --save-interval {WARM_UP}"
).split()


class Summing:
    """A thread that sums a piece of a checkpoint again and again while it is asked to."""

    def __init__(self, piece: Path) -> None:
        self.wanted, self.piece, self.rounds = threading.Event(), piece, 0
        threading.Thread(target=self._sum, daemon=True).start()

    def _sum(self) -> None:
        from megatron_let.checkpoint import sums

        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # as there
        while self.wanted.wait():
            sums.sha256(self.piece)
            self.rounds += 1


def measure(result: Path, argv: list[str]) -> None:
    """Train in this process; write the seconds of the save, of its sums, and of each step."""
    from megatron_let.upstream import cpu

    cpu.activate_if_wanted(["--cpu"])
    import torch
    from megatron.training import training

    from megatron_let import pretrain as pretrain_let
    from megatron_let.checkpoint import sums

    torch.set_num_threads(1)
    summing = Summing(result.with_name("piece"))
    found: dict[str, Any] = {"steps": [], "save": 0.0, "sums": 0.0, "rounds": 0}
    save, step = training.save_checkpoint_and_time, training.train_step

    def timed_save(*args: Any, **kwargs: Any) -> None:
        if found["save"]:
            return
        began = time.perf_counter()
        save(*args, **kwargs)
        found["save"] = time.perf_counter() - began
        [folder] = Path(argv[argv.index("--save") + 1]).glob("iter_*")
        files = sorted(folder.iterdir())
        largest = max(files, key=lambda path: path.stat().st_size)
        summing.piece.write_bytes(largest.read_bytes()[:PIECE])
        found["bytes"] = sum(path.stat().st_size for path in files)
        began = time.perf_counter()
        for path in files:
            sums.sha256(path)
        found["sums"] = time.perf_counter() - began

    def timed_step(*args: Any, **kwargs: Any) -> Any:
        if found["save"] and len(found["steps"]) % 2:
            summing.wanted.set()
        began = time.perf_counter()
        values = step(*args, **kwargs)
        if found["save"]:
            found["steps"].append(time.perf_counter() - began)
        summing.wanted.clear()
        return values

    sums.Sums.after_save = lambda *args: None  # type: ignore[method-assign]
    training.save_checkpoint_and_time, training.train_step = timed_save, timed_step
    sys.argv = ["pretrain_let.py", *argv]
    pretrain_let.main()
    result.write_text(json.dumps(found | {"rounds": summing.rounds}))


def main() -> None:
    """Run, print what was found; the exit status tells whether training waits too long."""
    parser = argparse.ArgumentParser(prog="sums.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--pairs", type=int, default=150, help="default: %(default)s")
    parser.add_argument("--hidden", type=int, default=384, help="default: %(default)s")
    options = parser.parse_args()
    hidden = options.hidden
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        flags = [*FLAGS, "--hidden-size", str(hidden), "--ffn-hidden-size", str(hidden * 8 // 3)]
        flags += ["--train-iters", str(WARM_UP + 2 * options.pairs)]
        flags += ["--save", f"{folder}/run", "--data-cache-path", folder]
        result = Path(folder, "found.json")
        code = "import sys, pathlib, benchmarks.sums as it\n"
        code += "it.measure(pathlib.Path(sys.argv[1]), sys.argv[2:])"
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, str(result), *flags]
        subprocess.run(command, check=True, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
        found = json.loads(result.read_text())
    sys.exit(report(found))


def report(found: dict[str, Any]) -> int:
    """Print what was found; return the exit status."""
    without, summed = np.array(found["steps"]).reshape(-1, 2).T
    ratios = 100 * (summed / without - 1)
    slower, (low, high) = float(np.median(ratios)), bounds(ratios)
    part = found["sums"] / found["save"]
    print(f"a checkpoint of {found['bytes'] / 1e6:.0f} MB, saved in {found['save']:.2f} s,")
    print(f"summed in {found['sums']:.2f} s: {100 * part:.0f} % of a save, if training waited\n")
    busy = 100 * found["rounds"] * PIECE / found["bytes"] * found["sums"] / summed.sum()
    print(f"steps: {len(ratios)} pairs of {np.median(without):.3f} s; the thread had a core in")
    print(f"{busy:.0f} % of the time that it could have had one")
    print(f"slower: {slower:+.1f} % ({low:+.1f} to {high:+.1f})")
    waits = [max(value, 0.0) * part for value in (slower, high)]
    print(f"\ntraining waits {waits[0]:.2f} % of a save, at most {waits[1]:.2f} %")
    return int(waits[1] > MAX_WAIT)


if __name__ == "__main__":
    main()
