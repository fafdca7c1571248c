"""How fast text becomes tokens: ours with both engines, each engine bare, Megatron-LM's own tool.

    .venv/bin/python benchmarks/preprocess.py [--megatron-lm PATH] [--rounds 3] [--fast]
    .venv/bin/python benchmarks/preprocess.py --fresh 200 2000

The corpus is distinct text that is found on any machine: the sources, headers and documentation
that are installed, each content once, and a few documents that are hard (empty, one token, very
long, Unicode); the tokenizer is a byte-level BPE trained on a part of it. Every round runs all of
them one after the other:

    ours, ours (tokenizers)     tools/preprocess_data.py --append-eod, engines auto and tokenizers
    megatron-lm                 tools/preprocess_data.py of a checkout of Megatron-LM
    bare gigatoken, bare tokenizers     one call for the parsed texts, as many threads as workers

`MB/s whole` counts from the start of the process; `MB/s at work` from the first block to the last,
verification included, as the tool prints it. Medians over the rounds. The pairs of ours and of
Megatron-LM must be byte-identical. Required: ours at least 15 x megatron-lm (whole) and 0.55 x bare
gigatoken (at work), ours (tokenizers) 0.9 x bare tokenizers (at work), and for a whole run on one
record at most 1.5 s.

With `--fresh` only memory: the tool on that many MB of text that never repeats, a tenth of whose
words are new; the peak is the sum of the processes' proportional set sizes.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

EOD = "<|endoftext|>"
SUFFIXES = set(".py .pyi .h .hpp .cuh .c .cpp .md .rst .txt .json .js .html .css".split())
LARGEST_FILE = 2_000_000
HARD = [
    "",
    "a",
    " ",
    EOD,
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u4f60\u597d \u0645\u0631",
    "x " * 2_000_000,
]
TARGETS = (
    ("ours", "megatron-lm", "whole", 15.0),
    ("ours", "bare gigatoken", "work", 0.55),
    ("ours (tokenizers)", "bare tokenizers", "work", 0.9),
)
START_SECONDS = 1.5
_BARE = """
import sys, time, orjson
from transformers import AutoTokenizer
engine, corpus, tokenizer = sys.argv[1:]
texts = [orjson.loads(line)["text"] for line in open(corpus, "rb")]
backend = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False).backend_tokenizer
if engine == "gigatoken":
    import gigatoken
    encode = gigatoken.Tokenizer.from_json(backend.to_str()).encode_batch
else:
    encode = backend.encode_batch_fast
start = time.perf_counter()
encode(texts)
print("SECONDS", time.perf_counter() - start)
"""


@dataclass(frozen=True)
class Corpus:
    """Documents, one a line, and a tokenizer."""

    path: Path
    tokenizer: Path
    megabytes: float
    """Of text in UTF-8."""


@dataclass(frozen=True)
class Timing:
    """One run."""

    whole: float
    """Seconds from the start of the process."""
    work: float
    """Seconds of tokenizing."""
    peak_bytes: int = 0


def installed_texts() -> Iterator[str]:
    """Text files of this environment, its Python and the system, each content once."""
    folders = [sysconfig.get_paths()[key] for key in ("purelib", "stdlib")]
    seen: set[bytes] = set()
    for folder in dict.fromkeys([*folders, "/usr/include", "/usr/share"]):
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix not in SUFFIXES or not path.is_file() or path.is_symlink():
                continue
            content = path.read_bytes()
            digest = hashlib.sha256(content).digest()
            if digest in seen or len(content) > LARGEST_FILE:
                continue
            seen.add(digest)
            try:
                yield content.decode()
            except UnicodeDecodeError:
                continue


def build_corpus(folder: Path, megabytes: int, vocab_size: int) -> Corpus:
    """Write the corpus and train the tokenizer."""
    path, size = folder / "corpus.jsonl", 0
    sample: list[str] = []
    with path.open("w") as file:
        for index, text in enumerate(installed_texts()):
            if size >= megabytes * 1e6:
                break
            size += len(text.encode())
            file.write(json.dumps({"text": text}) + "\n")
            if index % 8 == 0 and sum(map(len, sample)) < 20_000_000:
                sample.append(text)
        for text in HARD:
            file.write(json.dumps({"text": text}) + "\n")
            size += len(text.encode())
    return Corpus(path, train_tokenizer(folder / "tokenizer", sample, vocab_size), size / 1e6)


def train_tokenizer(folder: Path, sample: list[str], vocab_size: int) -> Path:
    """Train a byte-level BPE and save it as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOD).save_pretrained(folder)
    return folder


def commands(
    corpus: Corpus, output: Path, workers: int, megatron_lm: Path | None
) -> dict[str, list[str]]:
    """What every round runs, by name."""
    flags = f"--input {corpus.path} --append-eod --workers {workers} "
    flags += f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {corpus.tokenizer}"
    ours = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *flags.split()]
    bare = [sys.executable, "-c", _BARE]
    rows = {
        "ours": [*ours, "--output-prefix", str(output / "ours")],
        "ours (tokenizers)": [
            *ours,
            "--engine",
            "tokenizers",
            "--output-prefix",
            str(output / "tokenizers"),
        ],
        "bare gigatoken": [*bare, "gigatoken", str(corpus.path), str(corpus.tokenizer)],
        "bare tokenizers": [*bare, "tokenizers", str(corpus.path), str(corpus.tokenizer)],
    }
    if megatron_lm is not None:
        tool = [sys.executable, str(megatron_lm / "tools" / "preprocess_data.py")]
        rows["megatron-lm"] = [*tool, *flags.split(), "--output-prefix", str(output / "theirs")]
    return rows


def run(command: list[str], workers: int) -> Timing:
    """Run a command to its end and watch its memory."""
    environment = os.environ | {"RAYON_NUM_THREADS": str(workers)}
    with tempfile.TemporaryFile("w+") as said:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, text=True, env=environment
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, _proportional_bytes(process.pid))
            time.sleep(0.1)
        whole = time.perf_counter() - start
        said.seek(0)
        text = said.read()
    if process.returncode:
        sys.exit(f"{text[-4000:]}\n{' '.join(command)} failed")
    return Timing(whole, _work_seconds(text, whole), peak)


def _proportional_bytes(pid: int) -> int:
    """Memory of a process and its children, what they share counted once."""
    total = 0
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for member in family:
            total += member.memory_full_info().pss
    except psutil.Error:  # ended meanwhile
        pass
    return total


def _work_seconds(text: str, whole: float) -> float:
    if bare := re.search(r"SECONDS ([\d.]+)", text):
        return float(bare[1])
    reports = re.findall(r"Processed (\d+) documents \(([\d.]+) docs/s", text)
    return int(reports[-1][0]) / float(reports[-1][1]) if reports else whole


def check_identical(output: Path) -> None:
    """Exit unless all pairs in `output` have the same bytes."""
    for suffix in (".bin", ".idx"):
        digests = {
            path.name: hashlib.file_digest(path.open("rb"), "sha256").hexdigest()
            for path in sorted(output.glob(f"*{suffix}"))
        }
        if len(set(digests.values())) != 1:
            sys.exit(f"the outputs differ: {digests}")
        print(f"{', '.join(digests)}: identical, sha256 {next(iter(digests.values()))[:16]}")


def compare(options: argparse.Namespace, folder: Path) -> bool:
    """Run the rounds, print the table; whether all targets were met."""
    corpus = build_corpus(folder, options.megabytes, options.vocab_size)
    lines = sum(1 for _ in corpus.path.open("rb"))
    print(f"{corpus.megabytes:.0f} MB in {lines:,} distinct documents, {options.workers} workers")
    timings: dict[str, list[Timing]] = {}
    starts = []
    for number in range(options.rounds):
        output = folder / f"round{number}"
        output.mkdir()
        starts.append(start_seconds(corpus, output, options.workers))
        for name, command in commands(corpus, output, options.workers, options.megatron_lm).items():
            timings.setdefault(name, []).append(run(command, options.workers))
            print(f"  round {number + 1}: {name} {timings[name][-1].whole:.1f} s", flush=True)
        if number == 0:
            check_identical(output)
    tokens = sum(path.stat().st_size for path in output.glob("ours*.bin")) / 2
    print(f"\n{'':20} MB/s whole  MB/s at work  M tokens/s at work  peak MB")
    rates = {}
    for name, runs in timings.items():
        whole, work = (median(getattr(t, key) for t in runs) for key in ("whole", "work"))
        rates[name] = {"whole": corpus.megabytes / whole, "work": corpus.megabytes / work}
        peak = median(t.peak_bytes for t in runs) / 1e6
        print(
            f"{name:20} {rates[name]['whole']:10.2f} {rates[name]['work']:13.2f} "
            f"{tokens / work / 1e6:19.2f} {peak:8.0f}"
        )
    return options.fast or targets_met(rates, median(starts))


def start_seconds(corpus: Corpus, output: Path, workers: int) -> float:
    """A whole run of ours on one record."""
    folder = output / "start"
    folder.mkdir()
    (folder / "one.jsonl").write_text('{"text": "one"}\n')
    tiny = Corpus(folder / "one.jsonl", corpus.tokenizer, 0)
    return run(commands(tiny, folder, workers, None)["ours"], workers).whole


def targets_met(rates: dict[str, dict[str, float]], start: float) -> bool:
    """Print each target with its figure."""
    met = start <= START_SECONDS
    word = "met" if met else "MISSED"
    print(f"start, one record: {start:.2f} s (required {START_SECONDS}): {word}")
    for ours, theirs, which, wanted in TARGETS:
        if theirs in rates:
            ratio = rates[ours][which] / rates[theirs][which]
            met &= ratio >= wanted
            word = "met" if ratio >= wanted else "MISSED"
            print(f"{ours} / {theirs}, {which}: {ratio:.2f} (required {wanted}): {word}")
    return met


def fresh_text(path: Path, megabytes: int) -> None:
    """Write documents of random words, a tenth of them never seen before."""
    dice = np.random.default_rng(0)
    known = [
        bytes(dice.integers(97, 123, dice.integers(2, 10)).astype(np.uint8)) for _ in range(50_000)
    ]
    written, counter = 0, 0
    with path.open("wb") as file:
        while written < megabytes * 1e6:
            words = [known[i] for i in np.minimum(dice.zipf(1.3, 500), len(known)) - 1]
            for place in dice.integers(0, 500, 50):
                counter += 1
                words[place] = hashlib.md5(counter.to_bytes(8, "little")).hexdigest()[:9].encode()
            line = b'{"text": "' + b" ".join(words) + b'"}\n'
            written += file.write(line)


def measure_memory(options: argparse.Namespace, folder: Path) -> bool:
    """Peak memory for each size of fresh text; whether the last is within 10 % of the first."""
    tokenizer = build_corpus(folder, 20, options.vocab_size).tokenizer
    peaks = []
    for megabytes in options.fresh:
        path = folder / f"fresh{megabytes}.jsonl"
        fresh_text(path, megabytes)
        corpus = Corpus(path, tokenizer, megabytes)
        timing = run(commands(corpus, folder, options.workers, None)["ours"], options.workers)
        peaks.append(timing.peak_bytes)
        rate = megabytes / timing.work
        print(
            f"{megabytes:6} MB fresh text: peak {peaks[-1] / 1e6:.0f} MB, {rate:.1f} MB/s at work"
        )
        for made in folder.glob("ours_*"):
            made.unlink()
        path.unlink()
    print(f"growth {peaks[-1] / peaks[0] - 1:.1%} (required at most 10 %)")
    return peaks[-1] <= 1.1 * peaks[0]


def main() -> None:
    """Measure, print, and exit non-zero if a target was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megatron-lm", type=Path, help="a checkout of Megatron-LM")
    parser.add_argument("--megabytes", type=int, default=400, help="of text (default 400)")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fresh", type=int, nargs="+", metavar="MB", help="memory only")
    parser.add_argument("--fast", action="store_true", help="a smoke on 2 MB, no targets")
    options = parser.parse_args()
    if options.fast:
        options.megabytes, options.vocab_size, options.rounds = 2, 1000, 1
    with tempfile.TemporaryDirectory() as folder:
        measure = measure_memory if options.fresh else compare
        sys.exit(not measure(options, Path(folder)))


if __name__ == "__main__":
    main()
