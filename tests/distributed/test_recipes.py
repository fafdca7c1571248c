"""Every recipe trains on CPU: its own flags and TP, PP and VPP, with a small model and data."""

import pytest

from benchmarks.recipes import recipe_flags
from tests.distributed.training import records
from tests.support.testing import run_distributed
from tests.support.tiny_run import checkpoint
from tests.unit.examples.recipes import without_files

pytestmark = pytest.mark.slow

WORLD_SIZE = {"1.4b": 1, "3b": 2, "7b": 4}  # TP x PP, one data-parallel replica
SMALL = (
    "--num-layers 8 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 "
    "--seq-length 16 --max-position-embeddings 16 --global-batch-size 16 --train-iters 3 "
    "--lr-warmup-iters 1 --eval-interval 3 --eval-iters 1 --log-interval 1 --save-interval 4 "
    "--num-workers 0 --make-vocab-size-divisible-by 8 --cpu"
).split()
STOP = {"let": "--let-stop-step 2", "salt": "--kd-stop-step 2", "let+salt": "--let-stop-step 2"}


@pytest.mark.parametrize("method", ["baseline", "let", "salt", "reverse-kd", "let+salt"])
@pytest.mark.parametrize("size", WORLD_SIZE)
def test_three_steps(corpus, tmp_path, size, method):
    teacher = f"{corpus.folder}/teacher"
    flags = recipe_flags(size, method, teacher, tmp_path, tokenizer=teacher)
    argv = [*without_files(flags), *corpus.flags, *SMALL, *STOP.get(method, "").split()]
    errors = run_distributed("tests.distributed.training:train", WORLD_SIZE[size], argv)
    assert set(errors) == {None}
    [save] = (tmp_path / "save").iterdir()
    assert save.name == f"pile_{size}-{method}-teacher-1234"
    steps = records(save, "train")
    assert set(steps) == {1, 2, 3} and all(5 < step["lm loss"] < 6 for step in steps.values())
    guided = {"let loss", "kd loss"} & set().union(*steps.values())
    assert bool(guided) == (method != "baseline")
    assert checkpoint(save, 3).args().bf16
