"""The wheel, installed into an environment of its own, far from any checkout."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from megatron_let.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The `bin` of an environment with the wheel; what it depends on is borrowed by a `.pth`."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools builds beside what it reads
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "megatron_let"):
        subprocess.run(["cp", "-r", ROOT / name, source], check=True)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    own = "--no-deps --no-build-isolation".split()
    subprocess.run([*pip, "wheel", *own, "-w", folder, source], check=True)
    venv.create(folder / "env", with_pip=False)
    [site] = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    [wheel] = folder.glob("*.whl")
    python = str(folder / "env" / "bin" / "python")
    install = [*pip, "--python", python, "install", "--no-deps", wheel]
    subprocess.run(install, env=elsewhere(), check=True)  # or a checkout counts as installed
    return folder / "env" / "bin"


def elsewhere():
    """The environment of a user who knows of no checkout."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


def call(installed, folder, *words, timeout=200, **variables):
    done = subprocess.run(
        [installed / words[0], *words[1:]], cwd=folder, env=elsewhere() | variables,
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_it_is_the_wheels_code_that_runs(installed, tmp_path):
    where = call(installed, tmp_path, "python", "-c", "import megatron_let as m; print(m.__file__)")
    assert where.startswith(str(installed.parent))
    listed = call(installed, tmp_path, "megatron-let")
    assert all(f"\n  {name} " in listed for name in COMMANDS)
    plan = "plan --student 1.4b --teacher smollm-135m --gpus 32".split()
    assert "1,415,677,952 parameters" in call(installed, tmp_path, "megatron-let", *plan)


def test_it_trains_on_the_cpu_whatever_is_promised(installed, tmp_path):
    """By torchrun, and as a module: the quickstart below."""
    (tmp_path / "run.flags").write_text(
        "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --lr 1e-3\n"
        "--max-position-embeddings 16 --micro-batch-size 1 --global-batch-size 2 --train-iters 2\n"
        "--tokenizer-type NullTokenizer --vocab-size 255 --mock-data --eval-iters 0 --cpu\n"
        "--eval-interval 5 --log-interval 1  # a run that takes seconds\n"
    )
    run = "megatron-let", "pretrain", "@run.flags"
    assert "> step 2/2 | loss 5." in call(installed, tmp_path, *run, SLURM_GPUS_ON_NODE="8")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quickstart_runs_in_an_empty_folder(installed, tmp_path):
    text = call(installed, tmp_path, "megatron-let", "quickstart", "--fast", timeout=850)
    results = tmp_path / "runs" / "quickstart" / "fast" / "behind"
    assert "| let" in (results / "report.md").read_text() and "goes on from" in text
    assert (results / "report.png").read_bytes().startswith(b"\x89PNG")
