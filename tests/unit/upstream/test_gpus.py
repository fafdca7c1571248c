"""What counts as a promise of GPUs, on a root folder of the test's own."""

import importlib
import sys
from unittest import mock

import pytest
import torch

from megatron_let.upstream import accelerators
from megatron_let.upstream.gpus import check_accelerators, promise, reason

FILES = {
    "device": "dev/nvidia0",
    "control": "dev/nvidiactl",
    "driver": "proc/driver/nvidia/version",
}


def machine(tmp_path, *files):
    for file in files:
        path = tmp_path / FILES[file]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


@pytest.mark.parametrize(
    "variable",
    [
        "SLURM_GPUS_ON_NODE=8",
        "SLURM_GPUS_PER_NODE=a100:8",
        "SLURM_GPUS=h100:2,a100:0",
        "SLURM_GPUS_PER_TASK=1",
        "SLURM_JOB_GPUS=0",
        "SLURM_STEP_GPUS=0,1",
        "GPU_DEVICE_ORDINAL=0",
        "CUDA_VISIBLE_DEVICES=0",
        "CUDA_VISIBLE_DEVICES=GPU-8932f937-d72c-4106-c12f-20bd9faed9f6",
    ],
)
def test_a_job_with_gpus_promises_them(variable, tmp_path):
    assert promise(dict([variable.split("=")]), tmp_path) == variable


@pytest.mark.parametrize(
    "variable",
    [
        "PATH=/usr/bin",
        "SLURM_GPUS_ON_NODE=0",
        "SLURM_GPUS_PER_NODE=a100:0",
        "SLURM_JOB_GPUS=",
        "CUDA_VISIBLE_DEVICES=",
        "CUDA_VISIBLE_DEVICES=-1",
        "CUDA_VISIBLE_DEVICES=NoDevFiles",
    ],
)
def test_a_job_without_gpus_promises_none(variable, tmp_path):
    assert promise(dict([variable.split("=")]), tmp_path) is None


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["device", "control", "driver"], FILES["device"]),
        (["control"], FILES["control"]),
        (["driver"], "proc/driver/nvidia"),
    ],
)
def test_devices_and_a_driver_promise_gpus(files, said, tmp_path):
    assert promise({}, machine(tmp_path, *files)) == str(tmp_path / said)


def test_hidden_devices_are_no_promise_but_a_jobs_gpus_are(tmp_path):
    root = machine(tmp_path, *FILES)
    assert promise({"CUDA_VISIBLE_DEVICES": ""}, root) is None
    job = {"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "4"}
    assert promise(job, root) == "SLURM_GPUS_ON_NODE=4"


def test_the_reason_is_the_builds_or_torchs_first_line(monkeypatch):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found 11040).\nMore")

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert reason() == "The NVIDIA driver on your system is too old (found 11040)"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert reason() == "it is a build without CUDA"


@mock.patch.dict(sys.modules)
def test_a_broken_transformer_engine_is_named_or_left_alone(tmp_path, monkeypatch):
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "pytorch.py").write_text("import a_package_that_is_missing")
    monkeypatch.syspath_prepend(str(tmp_path))

    def forget():
        for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
            del sys.modules[name]

    forget()
    words = (
        "cannot be loaded .*No module named 'a_package_that_is_missing'.*--transformer-impl local"
    )
    with pytest.raises(SystemExit, match=words):
        check_accelerators(["--transformer-impl", "transformer_engine"])
    check_accelerators(["--transformer-impl=local"])
    assert sys.modules["transformer_engine"] is None
    (package / "pytorch.py").write_text("")
    forget()
    check_accelerators([])
    assert sys.modules["transformer_engine"] is not None


@mock.patch.dict(sys.modules)
@pytest.mark.parametrize("file", ["apex/__init__.py", "fused_weight_gradient_mlp_cuda.py"])
def test_a_broken_apex_is_left_out_in_a_line(tmp_path, monkeypatch, capsys, file):
    path, name = tmp_path / file, file.partition("/")[0].removesuffix(".py")
    path.parent.mkdir(exist_ok=True)
    path.write_text("raise OSError('libcudart.so.11.0: cannot open\\n...')")
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop(name, None)
    assert not accelerators._is_found(importlib.import_module, name)
    check_accelerators([])
    assert sys.modules[name] is None
    line = f"> {name} is left out: it cannot be loaded (OSError: libcudart.so.11.0: cannot open)\n"
    assert capsys.readouterr().out == line
