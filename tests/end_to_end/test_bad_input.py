"""What a user sees: `python pretrain_let.py` ends with one paragraph, or warns and goes on.

The other mistakes go through the same lines of `pretrain_let.py`; `tests/unit/test_arguments.py`
has them all.
"""

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.testing import run_distributed, run_program, save_tiny_teacher

ROOT = Path(__file__).resolve().parents[2]
MODEL = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 "
    "--max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 2 --lr 1e-3 "
    "--tokenizer-type NullTokenizer --vocab-size 255 --mock-data --num-workers 0 --train-iters 4 "
    "--log-interval 1 --eval-iters 0 --eval-interval 10 --cpu"
).split()


def pretrain(*flags: str) -> subprocess.CompletedProcess[str]:
    """Run it as a user without torchrun does: one process."""
    return run_program(str(ROOT / "pretrain_let.py"), *MODEL, *flags)


def test_a_mistake_ends_with_one_paragraph():
    result = pretrain(*"--method let --teacher-model ./nowhere --let-decay constant".split())
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    [line] = [x for x in result.stderr.splitlines() if x.startswith("pretrain_let.py: error: ")]
    assert "--teacher-model ./nowhere: there is no such folder, or" in line
    assert result.stderr.endswith(f"{line}\n")


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """What a run prints whose teacher has never been trained."""
    teacher = save_tiny_teacher(tmp_path_factory.mktemp("teacher"))
    flags = f"--method let --teacher-model {teacher} --let-layer 2 --let-decay constant "
    flags += "--train-iters 4 --log-interval 1 --eval-interval 10 --num-workers 0"
    return run_distributed("tests.unit.command_line:train", 1, flags.split())[0]


def test_a_teacher_that_guesses_is_named(untrained):
    # A random model's loss: ln(256), give or take what its small weights do.
    warning = r"> WARNING: a loss of 5\.\d+ is close to ln\(vocabulary\) = 5\.545: (.*)"
    found = re.search(warning, untrained)
    assert found is not None, untrained
    assert "guesses. Was it trained, on such text, with this tokenizer?" in found[1]


def test_the_run_goes_on_after_the_warning(untrained):
    assert len(re.findall(r"> step \d+/4 .*\| let ", untrained)) == 4
