"""Without a GPU that torch can use: refused where one is promised, said where none is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_let.upstream.gpus import COUNTS, INDICES, promise
from tests.support.tiny_run import FLAGS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here")
ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = str(ROOT / "pretrain_let.py")
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def call(*words, **variables):
    """Run a command of Python's in a job with these variables, and no GPU else."""
    environment = {k: v for k, v in os.environ.items() if k not in (*LAUNCHER, *COUNTS, *INDICES)}
    environment |= {"OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def errors(result):
    return [line for line in result.stderr.splitlines() if ": error: " in line]


@pytest.mark.parametrize("launcher", [[], TORCHRUN], ids=["python", "torchrun"])
def test_a_broken_gpu_node_is_refused_in_one_line(launcher):
    result = call(*launcher, PRETRAIN, "--num-layers", "2", SLURM_GPUS_ON_NODE="8")
    assert result.returncode == 1
    [said] = errors(result)
    assert said.startswith("pretrain_let.py: error: GPUs are promised here (SLURM_GPUS_ON_NODE=8)")
    why = "build without CUDA" if torch.version.cuda is None else "NVIDIA driver on your system"
    assert why in said and "add --cpu to run on the CPU" in said
    assert "no GPU" not in result.stdout


def test_the_tools_that_use_a_gpu_refuse_it_too(tmp_path):
    select = ("tools/select_data.py", "--keep-fraction", "0.5", "--output", tmp_path / "x.npz")
    for tool in (select, ("tools/evaluate.py", "tasks", "model", "--output", tmp_path)):
        result = call(*tool, CUDA_VISIBLE_DEVICES="0")
        assert result.returncode == 1
        [said] = errors(result)
        assert "GPUs are promised here (CUDA_VISIBLE_DEVICES=0), but torch " in said
        way_out = "--cpu" if tool is select else "--device cpu"
        assert f"add {way_out} to run on the CPU" in said


def test_asked_for_the_cpu_is_used_whatever_is_promised():
    """By a tool; by a run: `test_wheel.py`."""
    result = call("tools/evaluate.py", "tasks", "x", "--output", "x", "--device", "cpu", "--tasks",
                  "no such task", SLURM_GPUS_ON_NODE="8")  # fmt: skip
    assert "no such task is none of" in errors(result)[0]


def test_help_is_given_on_any_machine():
    result = call(PRETRAIN, "--help", SLURM_GPUS_ON_NODE="8")
    assert result.returncode == 0 and result.stdout.startswith("usage: ")


@pytest.mark.skipif(promise({}) is not None, reason="there are GPUs that torch cannot use here")
def test_a_run_on_a_machine_without_gpus_says_so_and_speaks_of_none(tmp_path):
    flags = [word for word in FLAGS if word != "--cpu"]
    data = "--mock-data --tokenizer-type NullTokenizer --vocab-size 255".split()
    flags += ["--log-throughput", "--train-iters", "2", "--verbose-console"]
    result = call(PRETRAIN, *flags, *data, "--save", tmp_path, "--log-progress")
    assert result.returncode == 0, result.stderr
    first, *lines = result.stdout.splitlines()
    assert first == "no GPU: training on CPU"
    rates = [line for line in lines if "TFLOP/s" in line]
    assert len(rates) == 2 and not any("GPU" in line for line in rates)
    assert sum("throughput per process (TFLOP/s/process)" in line for line in rates) == 2
    assert "without Transformer Engine" not in result.stdout
    started, saved = (tmp_path / "progress.txt").read_text().splitlines()
    assert "# processes: 1\tStarting job" in started and "GPU" not in saved
