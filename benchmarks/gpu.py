"""What one GPU shows of the whole product, in less than nine minutes.

    .venv/bin/python benchmarks/gpu.py [--cpu-smoke]

Each part is a process of its own with a time limit; what it found is kept in `runs/gpu/` and not
measured again on the same device with the same versions and commit, so that a second call goes on
where the first one ran out of time. Nothing comes from a network: data, tokenizers and untrained
teachers of the recipes' shapes are made on the spot.

    tests    pytest -m gpu
    ranks    single ranks of the recipes pile_1.4b and pile_7b, alone under --fake-process-group,
             with real kernels: plain, LET and SALT steps in turns (`run_measured.py`), peak memory
             beside the plan of tools/plan.py, the places where the host waits for the GPU. A step
             has few micro-batches, of fewer rows where the plan says that they would not fit.
    whole    a student of the 1.4 B shape on this GPU: tokens/s and MFU of --method baseline, let

A step of a pipeline lasts as long as its slowest stage, so that LET's overhead of a recipe is that
of the slowest of its ranks here. Required: at most 4 %, no test failed, each peak within 5 % of the
plan. Prints a table and writes a row of docs/tested_on.md; `--cpu-smoke` does all of it at a tiny
size, without targets, and writes its row beside its results.
"""

import argparse
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_report  # noqa: E402
from benchmarks.recipes import default_teacher, planned, recipe_flags, without  # noqa: E402
from megatron_let.data.indexed import PairWriter, write_index  # noqa: E402
from megatron_let.planning.memory import RUNTIME_BYTES  # noqa: E402
from megatron_let.planning.plan import Plan  # noqa: E402
from megatron_let.planning.shapes import TEACHERS  # noqa: E402

IN_TURNS = ("baseline", "let", "salt")
CYCLES = 5
LEAST_SECONDS = 20
"""Nothing is begun with less time than this."""
MICRO_BATCHES = 4
"""At most so many a step: the recipes have up to 16."""
USED_MEMORY = {True: 0.9, False: 0.75}
"""Share of the GPU that a plan may fill, with and without Transformer Engine's layers."""
SMOKE_FLAGS = (
    "--num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --seq-length 16 "
    "--max-position-embeddings 16 --make-vocab-size-divisible-by 8 --num-workers 0 --cpu"
).split()
SMOKE_GUIDED_FLAGS = "--let-layer 4".split()
"""So that the last stage has both signals."""
SMOKE_TEACHER = {
    "vocab_size": 256, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96,
}  # fmt: skip
RUN_FLAGS = "--lr-warmup-iters 1 --eval-iters 0".split()
GUIDED_FLAGS = "--teacher-control random --let-decay constant".split()
_DEVICE = """
import json, torch
found = {"device": None, "bytes": 0, "torch": torch.__version__, "CUDA": torch.version.cuda}
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    found |= {"device": gpu.name, "bytes": gpu.total_memory}
try:
    import transformer_engine.pytorch
    from importlib.metadata import version
    found["Transformer Engine"] = version("transformer-engine")
except Exception:
    found["Transformer Engine"] = None
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Part:
    """One process: the tests, or a run of one rank of a recipe on `gpus` GPUs."""

    name: str
    seconds: int
    size: str = ""
    gpus: int = 0
    rank: int = 0
    method: str = "let+salt"
    modes: tuple[str, ...] = IN_TURNS

    @property
    def file(self) -> str:
        """Its name without spaces."""
        return self.name.replace(" ", "-")


def parts_of(smoke: bool) -> list[Part]:
    """All parts. A layout's last rank is one of the last stage, and of tensor-parallel rank 1."""
    ranks, methods = [("1.4b", 32, 0), ("7b", 32, 0), ("7b", 32, 31)], ["baseline", "let"]
    if smoke:
        ranks, methods = [("7b", 8, 7)], ["let"]
    return [
        Part("tests", 240),
        *(Part(f"{size} rank {rank} of {n}", 150, size, n, rank) for size, n, rank in ranks),
        *(Part(f"1.4b whole {m}", 100, "1.4b", 1, 0, m, (m,)) for m in methods),
    ]


# --- what is here ------------------------------------------------------------------------------


def facts(commit: str | None, smoke: bool) -> dict[str, Any]:
    """Device, versions and commit: what a result belongs to."""
    if smoke:
        cores = len(os.sched_getaffinity(0))
        found = {"device": f"CPU ({cores} cores), tiny", "bytes": 0, "torch": version("torch")}
        found |= {"CUDA": None, "Transformer Engine": None}
    else:
        said = subprocess.check_output([sys.executable, "-c", _DEVICE], text=True)
        found = json.loads(said.splitlines()[-1])
    packages = {name: version(name) for name in ("megatron-core", "transformers")}
    python = ".".join(map(str, sys.version_info[:3]))
    return found | packages | {"Python": python, "commit": commit or commit_here()}


def commit_here() -> str:
    """Short hash, and one of what was changed since; the page written here does not count."""
    outputs = [
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, check=False).stdout
        for words in (
            ["rev-parse", "--short", "HEAD"],
            ["diff", "HEAD", "--", ".", f":!{gpu_report.PAGE}"],
        )
    ]
    head, changes = outputs[0].decode().strip(), outputs[1]
    changed = f"+{hashlib.sha256(changes).hexdigest()[:7]}" if changes else ""
    return head + changed if head else "unknown"


# --- what a run needs --------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where parts are run and leave what they found."""

    folder: Path
    here: dict[str, Any]
    smoke: bool

    @property
    def fused(self) -> bool:
        """Whether Transformer Engine's layers are used."""
        return self.here["Transformer Engine"] is not None

    def teacher(self, size: str) -> Path:
        """The folder of a recipe's own teacher."""
        return self.folder / default_teacher(size)


def prepare(size: str, place: Place) -> list[str]:
    """Write a recipe's teacher, tokenizer and data; return the flags that it starts a run with."""
    teacher = place.teacher(size)
    config = TEACHERS[teacher.name] | (SMOKE_TEACHER if place.smoke else {})
    prepared = place.folder / "data" / teacher.name
    for folder in (teacher, prepared):
        folder.mkdir(parents=True, exist_ok=True)
    (teacher / "config.json").write_text(json.dumps(config))
    _write_tokenizer(teacher, config["vocab_size"])
    for name in ("pile_text_document", "valid_text_document"):
        _write_data(prepared / name, config["vocab_size"], 20_000 if place.smoke else 2_000_000)
    blend = f"1 {prepared}/pile_text_document"
    flags = recipe_flags(size, "baseline", str(teacher), place.folder, str(teacher), blend)
    flags = without(flags, lambda flag: flag.startswith(("--save", "--verify-", "--method")))
    return [*flags, *(SMOKE_FLAGS if place.smoke else [])]


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    words.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _write_data(prefix: Path, vocab_size: int, tokens: int) -> None:
    writer = PairWriter(prefix)
    documents = np.full(tokens // 1000, 1000)
    ids = np.random.default_rng(0).integers(1, vocab_size, documents.sum(), dtype=np.int32)
    writer.add(ids, documents)
    writer.commit()
    writer.close()
    write_index(prefix, np.int32)


def fitted(flags: list[str], part: Part, place: Place) -> list[str]:
    """The batch flags that this GPU has memory and time for."""
    own = plans_of(flags, part, place)[part.modes[0]]
    count = min(MICRO_BATCHES, own.run.micro_batches(own.layout))
    memory = place.here["bytes"] * USED_MEMORY[place.fused]
    for halvings in range(own.run.micro_batch_size.bit_length()):
        rows = own.run.micro_batch_size >> halvings
        everywhere = rows * own.layout.dp * count
        batch = ["--micro-batch-size", str(rows), "--global-batch-size", str(everywhere)]
        plans = plans_of([*flags, *batch], part, place).values()
        needed = max(plan.memory[stage_of(part, plan)].total for plan in plans)
        if needed <= memory or place.smoke:
            break
    return batch


def plans_of(flags: list[str], part: Part, place: Place) -> dict[str, Plan]:
    """The plan of each mode."""
    attention = [] if place.fused else ["--no-flash-attention"]
    teacher = str(place.teacher(part.size))
    return {
        mode: planned([*flags, "--method", mode], part.gpus, teacher, *attention)
        for mode in part.modes
    }


def stage_of(part: Part, plan: Plan) -> int:
    """Pipeline stages are blocks of neighbouring ranks."""
    return part.rank * plan.layout.pp // part.gpus


# --- the parts ---------------------------------------------------------------------------------


def run_tests(place: Place, seconds: float) -> dict[str, Any]:
    """`pytest -m gpu`; its last line."""
    log = place.folder / "tests.log"
    at_once = ["-n", str(min(3, len(os.sched_getaffinity(0))))]  # most of a short run is its start
    run_logged(["-m", "pytest", "-m", "gpu", "tests/gpu", *at_once], {}, log, seconds)
    return {"summary": log.read_text().splitlines()[-1]}


def run_rank(part: Part, place: Place, seconds: float) -> dict[str, Any]:
    """Measure a rank's steps; what was found, beside the plan."""
    flags = prepare(part.size, place)
    flags += fitted(flags, part, place)
    plans = plans_of(flags, part, place)
    flags += [*RUN_FLAGS, "--method", part.method]
    flags += ["--fake-process-group"] * (part.gpus > 1)
    if part.method != "baseline":
        flags += ["--teacher-model", str(place.teacher(part.size)), *GUIDED_FLAGS]
        flags += SMOKE_GUIDED_FLAGS * place.smoke
    result = place.folder / f"{part.file}.found"
    result.unlink(missing_ok=True)
    variables = {"RANK": part.rank, "WORLD_SIZE": part.gpus, "LOCAL_RANK": 0}
    variables |= {"LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    variables |= {"MODES": ",".join(part.modes), "CYCLES": 1 if place.smoke else CYCLES}
    command = ["benchmarks/run_measured.py", *flags]
    log = place.folder / f"{part.file}.log"
    run_logged(command, variables | {"RESULT": result}, log, seconds)
    found = json.loads(result.read_text())
    if found["trained"] != found["steps"]:
        raise RuntimeError(f"trained {found['trained']} of {found['steps']} steps ({log})")
    if not math.isfinite(found["loss"] or 0.0):
        raise RuntimeError(f"the loss is {found['loss']} ({log})")
    return found | beside_plan(part, plans)


def beside_plan(part: Part, plans: dict[str, Plan]) -> dict[str, Any]:
    """What the plans of a rank's modes say."""
    memory = {mode: plan.memory[stage_of(part, plan)] for mode, plan in plans.items()}
    plan = plans[part.modes[0]]
    return {
        "planned_bytes": {mode: stage.total - RUNTIME_BYTES for mode, stage in memory.items()},
        "with_teacher": {mode: stage.teacher > 0 for mode, stage in memory.items()},
        "micro_batch_size": plan.run.micro_batch_size,
        "micro_batches": plan.run.micro_batches(plan.layout),
        "tokens_per_step": plan.run.tokens_per_step // plan.layout.dp,
        "flops_per_token": plan.student_flops_per_token,
    }


def run_logged(words: list[str], environment: dict[str, Any], log: Path, seconds: float) -> None:
    """Run Python with these words; it and all that it started end in time.

    Raises:
        RuntimeError: with the last words of one that failed.
    """
    variables = {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in environment.items()}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=os.environ | variables,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"no end after {seconds:.0f} s, see {log}") from None
        finally:
            _end_group(process)
    if code:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        # Behind an error there may still be warnings of threads that end.
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
        raise RuntimeError(f"{(errors or lines or [f'exit status {code}'])[-1]} ({log})")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def known(path: Path, here: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier call found here."""
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return kept["found"] if kept["here"] == here else None


def run_parts(parts: list[Part], place: Place, minutes: float) -> gpu_report.Results:
    """Run what is not known yet, as long as there is time."""
    deadline = time.monotonic() + 60 * minutes
    results = gpu_report.Results({}, {})
    for part in parts:
        path = place.folder / f"{part.file}.json"
        found, left = known(path, place.here), deadline - time.monotonic()
        print(f"{part.name}: {'known' if found else f'{left:.0f} s are left'}", flush=True)
        try:
            if found is None:
                found = run_part(part, place, left)
                path.write_text(json.dumps({"here": place.here, "found": found}, indent=1))
            results.found[part.name] = found
        except Exception as error:  # the other parts are run all the same
            results.failed[part.name] = f"{type(error).__name__}: {error}"
    return results


def run_part(part: Part, place: Place, left: float) -> dict[str, Any]:
    """Run one part if time is left for it."""
    if left < LEAST_SECONDS:
        raise TimeoutError("not run, the time is up: call again")
    seconds = min(part.seconds * (3 if place.smoke else 1), left)
    return run_rank(part, place, seconds) if part.size else run_tests(place, seconds)


def main() -> None:
    """Run, print, write the row; exit non-zero if a part failed or a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu-smoke", action="store_true", help="tiny, on CPU, no targets")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="those that begin so")
    parser.add_argument("--minutes", type=float, default=8.5, help="time for all (default 8.5)")
    parser.add_argument("--output", type=Path, help="default: runs/gpu")
    parser.add_argument("--commit", help="what is tested, where there is no git history")
    options = parser.parse_args()
    smoke = options.cpu_smoke
    options.output = (options.output or ROOT / "runs" / "gpu" / ("smoke" * smoke)).resolve()
    here = facts(options.commit, smoke)
    if here["device"] is None:
        parser.exit(2, "gpu.py: error: torch sees no CUDA device. --cpu-smoke runs it on CPU.\n")
    options.output.mkdir(parents=True, exist_ok=True)
    wanted = tuple(options.parts or [""])
    parts = [part for part in parts_of(smoke) if part.name.startswith(wanted)]
    results = run_parts(parts, Place(options.output, here, smoke), options.minutes)
    missed = [] if smoke else gpu_report.misses(results)
    print(gpu_report.page(results, missed, here))
    if not options.parts:
        page = options.output / "tested_on.md" if smoke else ROOT / gpu_report.PAGE
        gpu_report.write_row(page, gpu_report.row(results, missed, here, smoke))
    sys.exit(bool(missed or results.failed))


if __name__ == "__main__":
    main()
