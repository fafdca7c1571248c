"""`examples/torchrun/train.sh`: two agents, as on two nodes, and no Slurm."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.training import records
from tests.support.testing import _free_port
from tests.support.tiny_run import FLAGS, STEPS, make_corpus

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "examples" / "torchrun" / "train.sh")


@pytest.mark.slow
def test_two_agents_find_each_other_and_a_second_call_goes_on(tmp_path):
    corpus, save = make_corpus(tmp_path / "corpus"), tmp_path / "run"
    run = tmp_path / "run.flags"
    run.write_text(" ".join([*FLAGS, *corpus.flags, "--save", str(save), "--save-interval", "4"]))
    environment = {"HEAD": f"127.0.0.1:{_free_port()}", "NODES": "2", "PROCESSES": "1"}
    for steps, ends in ((4, ["--exit-interval", "4"]), (STEPS, [])):
        call = [SCRIPT, f"@{run}", *ends]
        nodes = [
            subprocess.Popen(call, cwd=tmp_path, env=os.environ | environment | {"ID": str(steps)})
            for _ in range(2)
        ]
        assert [node.wait(200) for node in nodes] == [0, 0]
        assert max(records(save, "train")) == steps
    missing = subprocess.run([SCRIPT, "--train-iters", "4"], capture_output=True, text=True)
    assert missing.returncode == 2 and "add --save DIR" in missing.stderr


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("--save run --load ./run", None),
        ("--save run --load run --ckpt-step 4", "every start would go back to --ckpt-step"),
        ("--save run --finetune", "every start would begin anew"),
    ],
)
def test_a_start_that_is_no_other_than_the_first(flags, error, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ $1 != -m ] || exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python)}
    call = [SCRIPT, *flags.split()]
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == (2 if error else 0), done.stderr
    assert error is None or error in done.stderr
