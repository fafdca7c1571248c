"""What a dry run found, on one screen."""

import sys

import pytest

from megatron_let.dry_run import flags, start
from megatron_let.dry_run.start import Found, found_by, screen
from megatron_let.planning.memory import GIB

FOUND = [
    Found(
        rank=16 * stage, stage=stage, parameters=1_881_800_704, weights=3 * GIB, gradients=7 * GIB,
        optimizer=3 * GIB, teacher=2 * GIB, step=20 * GIB, flops=1.5e15, teacher_flops=1.2e14,
        collectives=[("TENSOR_MODEL_PARALLEL", "allgather_base", 1552, 100 * GIB)] * 40,
        seconds=37.2,
    )
    for stage in (0, 1)
]  # fmt: skip


def page(*line, found=FOUND):
    options = flags.parse(["--dry-run-world-size", "32", *line])
    return screen(found, options, ["the data (/x is not here) by mock data"])


def test_it_fits_a_screen():
    lines = page("--pipeline-model-parallel-size", "2").splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    assert lines[0].startswith("Dry run of 32 GPUs = TP 1 x PP 2 x DP 16: 2 of its ranks")
    assert any("the teacher's 120.00 (8.0%)" in line for line in lines)


@pytest.mark.parametrize(
    ("memory", "verdict"), [("80", "Fits"), ("37", "Fits"), ("36", "DOES NOT FIT")]
)
def test_whether_it_fits(memory, verdict):
    """35 GiB, and two for CUDA."""
    assert f"\n{verdict}: rank 0 needs 37.0 GiB of {memory} " in page(
        "--dry-run-gpu-memory", memory
    )


def test_a_rank_that_sends_nothing():
    alone = [Found(rank=0, stage=0)]
    assert "Rank 0 sends nothing." in page(found=alone)


def test_a_rank_is_given_what_it_reads_as_these_words(monkeypatch):
    """Every start reads `@FILE`s, this one's ranks too."""
    program = (
        "import os, sys; assert '@@me' in sys.argv; "
        f"print('{{\"rank\": 0, \"stage\": 0}}', file=open(os.environ['{flags.RESULT}'], 'w'))"
    )
    monkeypatch.setattr(start, "COMMAND", [sys.executable, "-S", "-c", program])
    monkeypatch.setattr(start.signal, "signal", lambda *_: None)
    assert found_by(["--data-cache-path", "@me"])[0] == [Found(rank=0, stage=0)]
