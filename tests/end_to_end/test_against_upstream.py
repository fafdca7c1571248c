"""`--method baseline` is Megatron-LM: the same losses and weights as its own `pretrain_gpt.py`."""

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "against_upstream.py"

needs_checkout = pytest.mark.skipif(
    "MEGATRON_LM_PATH" not in os.environ,
    reason="set MEGATRON_LM_PATH to a checkout of Megatron-LM at core_v0.19.0",
)


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("against_upstream", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["against_upstream"] = module
    spec.loader.exec_module(module)
    return module


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@needs_checkout
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("nproc", ["1", "4"])
def test_baseline_equals_upstream(nproc: str) -> None:
    checkout = os.environ["MEGATRON_LM_PATH"]
    result = run("--megatron-lm", checkout, "--nproc", nproc, "--fast")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "identical losses and weights" in result.stdout.splitlines()[-1]


@needs_checkout
@pytest.mark.slow
def test_a_changed_checkout_is_refused(benchmark: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "megatron" / "core").mkdir(parents=True)
    for name in benchmark.CHECKOUT_SHA256:
        shutil.copy(Path(os.environ["MEGATRON_LM_PATH"]) / name, tmp_path)
    benchmark.check_checkout(tmp_path)
    with (tmp_path / "model_provider.py").open("a") as file:
        file.write("\n")
    with pytest.raises(benchmark.UsageError, match="model_provider.py is not the one of core_v0"):
        benchmark.check_checkout(tmp_path)


@pytest.mark.slow
def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    result = run("--megatron-lm", str(tmp_path))
    assert result.returncode == 2
    assert "is not a checkout of Megatron-LM" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_difference_is_named_and_fails(benchmark: ModuleType) -> None:
    values = {name: [1.0, 2.0] for name in benchmark.COMPARED}
    outcome = benchmark.Outcome(values, [100.0], "abc")
    assert benchmark.first_difference(outcome, outcome) == ""
    other = replace(outcome, values=values | {"lm loss": [1.0, 2.0000002]})
    assert benchmark.first_difference(outcome, other).startswith("lm loss, 2 of 2: 2.0 and 2.00")
    assert benchmark.first_difference(outcome, replace(outcome, weights="abd")) == "final weights"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ratios", "difference", "fast", "status"),
    [
        ([0.9, 1.0, 1.5], "", False, 0),
        ([1.0, 1.02, 1.02], "", False, 1),
        ([1.0, 1.02, 1.02], "", True, 0),
        ([0.9], "final weights", True, 1),
    ],
)
def test_exit_status(
    benchmark: ModuleType, ratios: list[float], difference: str, fast: bool, status: int
) -> None:
    args = benchmark.argparse.Namespace(steps=20, nproc=1, fast=fast)
    assert benchmark.summarize(args, ratios, difference) == status
