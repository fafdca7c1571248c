"""What a conversion costs: its memory, and its speed beside a plain copy of the same bytes.

    .venv/bin/python benchmarks/conversion.py [--rounds 3] [--dtype bf16] [--fast]

The model has the paper's 1.4 B shape (24 layers of 2048, MLP 5504, 32 heads, 49,152 tokens) and
random weights. Every round runs, each in a process of its own, beside a copy of what it writes,
byte by byte, on the same disk:

    from-hf    Hugging Face to Megatron's torch_dist
    to-hf      back
    grow       a model of SmolLM-135M's shape to the shape of the recipe for it (30 layers of 2048,
               tied, float32), with the proof that both compute the same

All of them end when the bytes are on the disk (fsync). `MB/s` counts the weights once. `memory` is
the largest resident set during the conversion less that of the interpreter with its imports.
Required: at least half of the copy's speed (medians over the rounds), at most 1.5 GiB more memory;
the files that come back must be the same bytes.
"""

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

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
SMALL = SHAPE | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
GROWN = {
    "hidden_size": 2048,
    "ffn_hidden_size": 5504,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "kv_channels": 64,
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
elif kind == "grow":
    from benchmarks.conversion import GROWN
    from megatron_let.conversion.grow import grow_model
    from megatron_let.conversion.growth import Growth
    def work():
        grow_model(str(source), output, GROWN, Growth())
        for path in output.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
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


class Timed(NamedTuple):
    """One conversion, and a copy of as many bytes."""

    seconds: float
    copy_seconds: float
    gib: float
    size: int


def write_model(folder: Path, shape: dict[str, Any], dtype: torch.dtype) -> None:
    """Write a Llama with random weights, a tensor at a time."""
    folder.mkdir()
    config = AutoConfig.for_model("llama", **shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).to(dtype)
    tensors = model.state_dict()
    if shape["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    weights = (
        (name, torch.randn(tensor.shape, dtype=dtype) * 0.02) for name, tensor in tensors.items()
    )
    write_folder(folder, model, tensors, weights, "5GB")


def timed(kind: str, source: Path, output: Path) -> tuple[float, float]:
    """Run a copy or a conversion in a process; returns its seconds and GiB."""
    os.sync()  # what the one before left to be written is not charged to this one
    command = [sys.executable, "-c", _TIMED, kind, str(source), str(output)]
    result = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    line = next(line for line in result.stdout.splitlines() if line.startswith("RESULT"))
    seconds, gib = map(float, line.split()[1:])
    return seconds, gib


def measure(folder: Path, kinds: Sequence[str], rounds: int) -> dict[str, list[Timed]]:
    """Return what every round took."""
    found: dict[str, list[Timed]] = defaultdict(list)
    original = folder / "hf"
    places = {
        "from-hf": (original, folder / "megatron"),
        "to-hf": (folder / "megatron", folder / "back"),
        "grow": (folder / "small", folder / "grown"),
    }
    for round_number in range(1, rounds + 1):
        print(f"round {round_number} of {rounds}", flush=True)
        for kind in kinds:
            source, output = places[kind]
            seconds, gib = timed(kind, source, output)
            # Removed again: memory that was just in use is written to several times faster than
            # fresh memory of a virtual machine, so that the first conversion has the worst of it.
            copied = output if kind == "grow" else original
            copy_seconds, _ = timed("copy", copied, folder / "copy")
            shutil.rmtree(folder / "copy")
            size = sum(path.stat().st_size for path in copied.glob("*.safetensors"))
            found[kind].append(Timed(seconds, copy_seconds, gib, size))
        for path in original.glob("*.safetensors"):
            assert _same_weights(path, folder / "back" / path.name), (
                f"{path.name} came back changed"
            )
        for kind in kinds:
            shutil.rmtree(places[kind][1])
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
    with tempfile.TemporaryDirectory(dir=ROOT / "runs", prefix="conversion-") as name:
        folder, kinds = Path(name), ["from-hf", "to-hf", "grow"]
        write_model(folder / "hf", FAST if options.fast else SHAPE, DTYPES[options.dtype])
        if options.fast:
            kinds.remove("grow")
        else:
            write_model(folder / "small", SMALL, torch.bfloat16)
        found = measure(folder, kinds, 1 if options.fast else options.rounds)
    missed = []
    print(f"\n{'':<10}{'GB':>8}{'seconds':>10}{'copy':>10}{'of copy':>10}{'memory (GiB)':>15}")
    for kind, rounds in found.items():
        seconds, copied = (median(times) for times in list(zip(*rounds, strict=True))[:2])
        gib, gigabytes = max(r.gib for r in rounds), rounds[0].size / 1e9
        row = f"{kind:<10}{gigabytes:>8.2f}{seconds:>10.2f}{copied:>10.2f}"
        print(f"{row}{copied / seconds:>10.2f}{gib:>15.2f}")
        if copied / seconds < MIN_SPEED:
            missed.append(f"{kind}: {copied / seconds:.2f} of the copy (target {MIN_SPEED})")
        if gib > MAX_GIB:
            missed.append(f"{kind}: {gib:.2f} GiB (target {MAX_GIB})")
    if options.fast:
        print("\nThe short form has no targets.")
    else:
        print("\n" + ("Missed: " + "; ".join(missed) if missed else "All targets met."))
        sys.exit(bool(missed))


if __name__ == "__main__":
    main()
