"""The GPU path on fake CUDA tensors: no tensor on the wrong device, no wait of ours in a step.

Skipped where the trick of `fake_cuda.py` does not hold, with what it said.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.dry_run import MEASURED, dry, flags_of
from megatron_let.dry_run.flags import parse, replaced
from tests.support.tiny_run import FLAGS

ROOT = Path(__file__).resolve().parents[2]
GPU = [flag for flag in FLAGS if flag != "--cpu"] + "--bf16 --log-interval 5".split()
WORLD = 8
TP2, PP2 = "--sequence-parallel --tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
ZERO = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
VPP2 = "--num-layers-per-virtual-pipeline-stage 1 --micro-batch-size 1"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
LET, SALT = "--method let --let-layer 2 --let-stop-step 4", "--method salt --kd-stop-step 4"
BOTH = f"{LET} --kd-stop-step 4 --method let+salt"
LAYOUTS = {
    "TP 2, SP, PP 2, ZeRO-1 overlapped": (TP2, PP2, ZERO),
    "TP 2, PP 2 by virtual stages": (TP2, PP2, VPP2),
    "PP 2, full recomputation": (PP2, FULL),
    "a loss per token": ("--calculate-per-token-loss --global-batch-size 16", ZERO),
}
METHODS = {
    "let": LET,
    "let by the gradients, until they disagree": (
        f"{LET} --let-weight-rule ratio --guidance-stop cosine --guidance-patience 1"
    ),
    "let until the teacher is reached": f"{LET} --guidance-stop loss --guidance-patience 1",
    "a linear map": f"{LET} --let-resize linear",
    "salt": SALT,
    "salt by tokens, until the teacher is reached": (
        f"{SALT} --kd-token-gate --guidance-stop loss --guidance-patience 1"
    ),
    "let+salt": BOTH,
}


@pytest.fixture(scope="module")
def run_cases(corpus, tmp_path_factory):
    """Run cases (rank, flags of a layout, of a method or None, fault); what each found, by name."""

    def run(cases, **environment):
        folder = tmp_path_factory.mktemp("fake_cuda")
        for name, (rank, layout, method, fault) in cases.items():
            flags = [*GPU, *corpus.flags, *layout.split()]
            if method is not None:
                flags += [*method.split(), "--teacher-model", f"{corpus.folder}/teacher"]
            case = {"rank": rank, "world": WORLD, "flags": flags, "fault": fault}
            (folder / f"{name}.json").write_text(json.dumps(case))
        return found_in(folder, **environment)

    return run


def found_in(folder, **environment):
    """What each case of a folder found."""
    own = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    script = [sys.executable, "-W", "ignore", str(ROOT / "tests/distributed/fake_cuda.py")]
    done = subprocess.run(
        [*script, str(folder)], env=own, capture_output=True, text=True, check=False
    )
    if done.returncode == 3:  # NO_FAKE_CUDA, whose module is for another process
        pytest.skip(f"no fake CUDA with this torch: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]
    return {file.stem: json.loads(file.read_text()) for file in folder.glob("*.found")}


def further_waits(found, plain):
    assert "error" not in found, found["error"]
    assert "error" not in plain, plain["error"]
    return Counter(found["waits"]) - Counter(plain["waits"])


FIRST, LAST = 0, 7
"""Ranks of the two stages of eight GPUs; the last one logs."""


def test_a_guided_step_waits_no_more_than_a_plain_one(run_cases):
    """And a loss that reads is seen: the twin."""
    rules = f"{BOTH} --kd-token-gate --let-weight-rule ratio --guidance-stop loss"
    small = f"{TP2} --num-layers 2"
    found = run_cases(
        {
            "plain": (0, small, None, None),
            "guided": (0, small, f"{rules} --guidance-patience 1", None),
            "twin": (0, small, LET, "loss read"),
        }
    )
    assert not further_waits(found["guided"], found["plain"])
    assert found["guided"]["teacher"] > 0
    [(where, number)] = further_waits(found["twin"], found["plain"]).items()
    assert "attach.py" in where and number == 1, "one for each micro-batch"


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_method_waits_in_any_layout(run_cases, layout):
    flags = " ".join(LAYOUTS[layout])
    ranks = (FIRST, LAST) if PP2 in flags else (FIRST,)
    cases = {f"plain, {rank}": (rank, flags, None, None) for rank in ranks}
    for name, method in METHODS.items():
        cases |= {f"{name}, {rank}": (rank, flags, method, None) for rank in ranks}
    found = run_cases(cases)
    assert found.keys() == cases.keys()
    for name in METHODS:
        for rank in ranks:
            waits = further_waits(found[f"{name}, {rank}"], found[f"plain, {rank}"])
            assert not waits, (name, rank)


FAULTS = {
    "states on the CPU": (LET, "on the same device"),
    "mask on the CPU": (LET, "on the same device"),
    "sums on the CPU": (LET, "of a CPU tensor"),
    "width not resized": (LET, "must match the size"),
    "head on the CPU": (SALT, "on the same device"),
    "loss read": (LET, None),
    "masked tokens picked": (LET, "aten.nonzero"),
    "weight copied": (LET, None),
}
"""What is injected: the method, and the error; None: a wait of the host's."""


@pytest.mark.slow
def test_faults_are_found(run_cases):
    cases = {name: (0, TP2, method, name) for name, (method, _) in FAULTS.items()}
    found = run_cases({"plain": (0, TP2, None, None), **cases})
    for name, (_, error) in FAULTS.items():
        if error is None:
            assert further_waits(found[name], found["plain"]), name
        else:
            assert error in found[name].get("error", ""), (name, found[name].get("error"))


# --- with Transformer Engine's layers -----------------------------------------------------------

PYTHON_LAYER = "transformer-engine==2.20.2 onnxscript onnx onnx-ir ml-dtypes einops"
"""Its wheel of Python code, and what that imports; the kernels are those of `fake_te.py`."""


@pytest.fixture(scope="module")
def transformer_engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformer_engine")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*pip, *PYTHON_LAYER.split()], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no wheel of Transformer Engine: {done.stderr.strip().splitlines()[-1]}")
    return {"FAKE_TE": str(folder)}


@pytest.mark.slow
def test_no_method_waits_among_transformer_engines_layers(run_cases, transformer_engine):
    """And what is injected is found among them, too: the twins."""
    flags = " ".join(LAYOUTS["TP 2, SP, PP 2, ZeRO-1 overlapped"])
    cases = {f"plain, {rank}": (rank, flags, None, None) for rank in (FIRST, LAST)}
    for name in ("let", "salt"):
        cases |= {f"{name}, {rank}": (rank, flags, METHODS[name], None) for rank in (FIRST, LAST)}
    twins = ("states on the CPU", "loss read")
    cases |= {name: (FIRST, flags, LET, name) for name in twins}
    found = run_cases(cases, **transformer_engine)
    for name in ("let", "salt"):
        for rank in (FIRST, LAST):
            assert not further_waits(found[f"{name}, {rank}"], found[f"plain, {rank}"])
    on_the_cpu, read = (found[name] for name in twins)
    assert "on the same device" in on_the_cpu["error"]
    assert further_waits(read, found[f"plain, {FIRST}"])


PARTS = "weights gradients optimizer teacher step".split()


@pytest.mark.slow
def test_a_dry_run_holds_what_transformer_engines_layers_hold(tmp_path, transformer_engine):
    """Recipes' ranks that a GPU has run. Tolerance: 3 % of the GPU's peak, 2 % of both."""
    own, dry_peaks = {}, {}
    for (size, rank, batch), method in zip(MEASURED, ("let", "baseline", "salt"), strict=True):
        flags = flags_of(size, method, "--global-batch-size", str(batch))
        name = f"{size}, {rank}, {method}"
        (place := tmp_path / name).mkdir()
        words, _ = replaced(flags, parse(flags), place)
        case = {"rank": rank, "world": 32, "flags": words, "fault": None}
        (tmp_path / f"{name}.json").write_text(json.dumps(case))
        [alone] = dry(flags, str(rank))
        own[name], dry_peaks[name] = MEASURED[size, rank, batch][method], alone.peak / 2**30
    found = found_in(tmp_path, **transformer_engine)
    for name, measured in own.items():
        assert "error" not in found[name], found[name]["error"]
        peak = sum(found[name][part] for part in PARTS) / 2**30
        assert peak == pytest.approx(measured, rel=0.03), name
        assert dry_peaks[name] == pytest.approx(peak, rel=0.02), name
