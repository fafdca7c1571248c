"""Megatron's --fake-process-group: one rank of a layout trains alone, whichever it is."""

import re
from pathlib import Path

import pytest

from tests.support.testing import run_program
from tests.support.tiny_run import FLAGS, STEPS

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "last of two stages, TP rank 1": (7, "2"),  # would be sent its batches, and has the teacher
    "third of four stages, TP rank 1": (5, "4"),  # has none, and would be told to train
}


@pytest.mark.parametrize(("rank", "stages"), CASES.values(), ids=CASES)
def test_a_rank_that_others_feed_trains_every_step(corpus, tmp_path, rank, stages):
    layout = "--fake-process-group --sequence-parallel --tensor-model-parallel-size 2".split()
    layout += ["--pipeline-model-parallel-size", stages]
    elsewhere = ["--data-cache-path", str(tmp_path)]  # where no first rank has been
    launcher = {"RANK": str(rank), "WORLD_SIZE": "8", "LOCAL_RANK": "0"}
    launcher |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    argv = [*FLAGS, *corpus.flags, *elsewhere, *corpus.let("--let-layer", "4", *layout)]
    done = run_program(str(ROOT / "pretrain_let.py"), *argv, launcher=launcher)
    assert done.returncode == 0, done.stderr[-4000:]
    steps = re.findall(rf"> step (\d+)/{STEPS} ", done.stdout)
    assert steps == [str(step + 1) for step in range(STEPS)]
    assert f"rank {rank} of 8 alone" in done.stdout
