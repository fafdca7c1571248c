"""Whole runs on one GPU, against the CPU's and each other: `pytest -m gpu`.

Every run is a process of its own, as a user starts it. The losses after eight steps depend on the
gradients of all steps before, the teacher's part included.
"""

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.distributed.training import series
from tests.support.tiny_run import FLAGS, STEPS, make_corpus

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]
# Heads of 64: fused attention has kernels for them.
MODEL = "--hidden-size 128 --num-attention-heads 2 --ffn-hidden-size 256".split()
GUIDED = {"baseline": "none", "let": "let loss", "salt": "kd loss"}
GUIDED_STEPS = 4
METHODS = {
    "baseline": [],
    "let": "--method let --let-layer 2 --let-weight 1 --let-stop-step 4".split(),
    "salt": "--method salt --kd-weight 0.5 --kd-stop-step 4".split(),
}
FP32_TOLERANCE = 1e-4
"""Relative, of a loss: the order of sums differs, TF32 is off."""
BF16_TOLERANCE = 2e-2
"""Relative of a loss, and of the alignment's, a cosine's distance from 1, of that 1."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("gpu"))


def train_both(corpus, method, first, second):
    """Two runs at once, each a folder and its flags; what `train` returns of them."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda run: train(corpus, run[0], method, *run[1:]), [first, second]))


def train(corpus, save, method, *flags):
    """Run once; return the losses by step, and those of the method."""
    teacher = ["--teacher-model", f"{corpus.folder}/teacher"] if METHODS[method] else []
    common = [flag for flag in FLAGS if flag != "--cpu"]
    command = [sys.executable, str(ROOT / "pretrain_let.py"), *common, *MODEL, *corpus.flags]
    command += [*METHODS[method], *teacher, *flags, "--save", str(save)]
    command += ["--data-cache-path", f"{save}-cache"]  # of its own: another run makes one now
    environment = os.environ | {"NVIDIA_TF32_OVERRIDE": "0", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    losses, guided = series(save, "lm loss"), series(save, GUIDED[method])
    assert len(guided) == (GUIDED_STEPS if METHODS[method] else 0)
    return losses, guided


@pytest.fixture(scope="module")
def start(corpus):
    """Weights to start from: each device has random numbers of its own."""
    folder = corpus.folder / "start"
    train(
        corpus, folder, "baseline", "--transformer-impl", "local", "--cpu", "--exit-interval", "1"
    )
    return ["--load", str(folder), "--finetune", "--transformer-impl", "local"]


@pytest.mark.parametrize("method", METHODS)
def test_one_gpu_computes_what_the_cpu_does(corpus, start, tmp_path, method):
    runs = (
        (tmp_path / "gpu", *start, "--use-cpu-initialization"),
        (tmp_path / "cpu", *start, "--cpu"),
    )
    gpu, cpu = train_both(corpus, method, *runs)
    for ours, theirs in zip(gpu, cpu, strict=True):
        assert ours == pytest.approx(theirs, rel=FP32_TOLERANCE)
    assert len(gpu[0]) == STEPS


@pytest.mark.parametrize("method", METHODS)
def test_transformer_engine_agrees_with_the_local_layers(corpus, tmp_path, method):
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not installed (docs/install.md)")
    bf16 = ["--bf16", "--use-distributed-optimizer"]
    runs = (tmp_path / "te", *bf16), (tmp_path / "local", *bf16, "--transformer-impl", "local")
    fused, local = train_both(corpus, method, *runs)
    for ours, theirs in zip(fused, local, strict=True):
        assert ours == pytest.approx(theirs, rel=BF16_TOLERANCE, abs=BF16_TOLERANCE)


def test_a_resumed_run_goes_on_as_it_would_have(corpus, tmp_path):
    flags = ["--bf16", "--use-distributed-optimizer", "--save-interval", "2"]
    whole, _ = train(corpus, tmp_path / "whole", "baseline", *flags)
    start = ["--load", str(tmp_path / "whole"), "--ckpt-step", "2"]
    resumed, _ = train(corpus, tmp_path / "resumed", "baseline", *flags, *start)
    expected = {step: loss for step, loss in whole.items() if step > 2}
    assert resumed == pytest.approx(expected, rel=BF16_TOLERANCE)
