"""What a conversion costs: its memory, and its speed beside a plain copy of the same bytes.

    .venv/bin/python benchmarks/conversion.py [--rounds 3] [--dtype bf16] [--fast]

The model has the paper's 1.4 B shape (24 layers of 2048, MLP 5504, 32 heads, 49,152 tokens) and
random weights. Every round runs, each in a process of its own:

    copy       the exported files, byte by byte, on the same disk (before each of the others)
    from-hf    Hugging Face to Megatron's torch_dist
    to-hf      back

All of them end when the bytes are on the disk (fsync). `MB/s` counts the weights once. `memory` is
the largest resident set during the conversion less that of the interpreter with its imports.
Required: at most 1.5 GiB more, at least half of the copy's speed (medians over the rounds); the
files that come back must be the same bytes.
"""

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_let.conversion.safetensors_files import write_folder  # noqa: E402
from megatron_let.teacher.load import DTYPES  # noqa: E402

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
FAST = SHAPE | {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 256}
MAX_GIB = 1.5
MIN_SPEED = 0.5
_TIMED = """
import os, re, shutil, sys, time
from pathlib import Path
kind, source, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
if kind == "copy":
    def work():
        output.mkdir()
        for path in source.iterdir():
            shutil.copyfile(path, output / path.name)
            descriptor = os.open(output / path.name, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
elif kind == "from-hf":
    from megatron_let.conversion.from_hf import import_model
    work = lambda: import_model(str(source), output)
else:
    from megatron_let.conversion.to_hf import export
    work = lambda: export(source, output)
from transformers import LlamaForCausalLM  # imported late by transformers
def kib():  # getrusage's ru_maxrss would begin with the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before, start = kib(), time.perf_counter()
work()
print("RESULT", time.perf_counter() - start, (kib() - before) / 2**20)
"""


def write_model(folder: Path, shape: dict[str, int], dtype: torch.dtype) -> int:
    """Write a Llama with random weights, a tensor at a time; returns the bytes of its weights."""
    folder.mkdir()
    config = AutoConfig.for_model("llama", **shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).to(dtype)
    tensors = model.state_dict()
    weights = ((name, torch.randn(tensor.shape, dtype=dtype)) for name, tensor in tensors.items())
    write_folder(folder, model, tensors, weights, "5GB")
    return sum(tensor.nbytes for tensor in tensors.values())


def timed(kind: str, source: Path, output: Path) -> tuple[float, float]:
    """Run one of the three in a process; returns its seconds and GiB."""
    os.sync()  # what the one before left to be written is not charged to this one
    command = [sys.executable, "-c", _TIMED, kind, str(source), str(output)]
    result = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    line = next(line for line in result.stdout.splitlines() if line.startswith("RESULT"))
    seconds, gib = map(float, line.split()[1:])
    return seconds, gib


def measure(folder: Path, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return (seconds, GiB) of every round."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    original = folder / "hf"
    for round_number in range(1, rounds + 1):
        print(f"round {round_number} of {rounds}", flush=True)
        steps = [
            ("from-hf", original, folder / "megatron"),
            ("to-hf", folder / "megatron", folder / "back"),
        ]
        for kind, source, output in steps:
            # Before each a copy, removed again: memory that was just in use is written to several
            # times faster than fresh memory of a virtual machine.
            found["copy"].append(timed("copy", original, folder / "copy"))
            shutil.rmtree(folder / "copy")
            found[kind].append(timed(kind, source, output))
        for path in original.glob("*.safetensors"):
            assert _same_weights(path, folder / "back" / path.name), (
                f"{path.name} came back changed"
            )
        for _, _, output in steps:
            shutil.rmtree(output)
    return found


def _same_weights(path: Path, other: Path) -> bool:
    """The tensors' order in the files may differ."""
    if filecmp.cmp(path, other, shallow=False):
        return True
    from safetensors import safe_open

    with safe_open(path, "pt") as ours, safe_open(other, "pt") as theirs:
        names = set(ours.keys())
        return names == set(theirs.keys()) and all(
            torch.equal(ours.get_tensor(name), theirs.get_tensor(name)) for name in names
        )


def main() -> None:
    """Measure, print a table; the exit status tells of a missed target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="of the weights")
    parser.add_argument("--fast", action="store_true", help="a tiny model, no targets")
    options = parser.parse_args()
    shape = FAST if options.fast else SHAPE
    with tempfile.TemporaryDirectory(dir=ROOT / "runs", prefix="conversion-") as name:
        folder = Path(name)
        size = write_model(folder / "hf", shape, DTYPES[options.dtype])
        found = measure(folder, 1 if options.fast else options.rounds)
    print(f"\n{size / 1e9:.2f} GB of weights, {options.dtype}\n")
    print(f"{'':<10}{'seconds':>10}{'MB/s':>10}{'of copy':>10}{'memory (GiB)':>15}")
    speed = {kind: size / 1e6 / median(s for s, _ in pairs) for kind, pairs in found.items()}
    memory = {kind: max(gib for _, gib in pairs) for kind, pairs in found.items()}
    for kind, mb_per_s in speed.items():
        share = mb_per_s / speed["copy"]
        seconds = size / 1e6 / mb_per_s
        print(f"{kind:<10}{seconds:>10.2f}{mb_per_s:>10.0f}{share:>10.2f}{memory[kind]:>15.2f}")
    missed = [
        f"{kind}: {text}"
        for kind in ("from-hf", "to-hf")
        for text, bad in (
            (f"{memory[kind]:.2f} GiB (target {MAX_GIB})", memory[kind] > MAX_GIB),
            (
                f"{speed[kind] / speed['copy']:.2f} of the copy (target {MIN_SPEED})",
                speed[kind] < MIN_SPEED * speed["copy"],
            ),
        )
        if bad
    ]
    if options.fast:
        print("\nThe short form has no targets.")
    else:
        print("\n" + ("Missed: " + "; ".join(missed) if missed else "All targets met."))
        sys.exit(bool(missed))


if __name__ == "__main__":
    main()
