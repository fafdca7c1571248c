"""Flags that shape the layers: a teacher in vain leaves the baseline's run, bit for bit.

Which flags these are is found by `tests/unit/upstream/spec_trials.py`; of those that need no
Transformer Engine only --multi-latent-attention is not here, whose local layers Megatron-Core
0.19.2 fails to build.
"""

import pytest

from tests.distributed.training import run
from tests.support.tiny_run import hashes

EXPERTS = "--num-experts 4 --moe-router-topk 2"
SHAPES = {
    "qk-l2-norm": "--qk-l2-norm",
    "qk-l2-norm of experts": f"{EXPERTS} --qk-l2-norm",
    "qk-layernorm": "--qk-layernorm",
    "experts": EXPERTS,
    "experts in every second layer": f"{EXPERTS} --moe-layer-freq 2",
    "number of layers": "--num-layers 3",
}
STEPS = "--train-iters 4 --eval-interval 100".split()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_teacher_in_vain_changes_nothing(corpus, tmp_path, shape):
    flags = [*corpus.flags, *SHAPES[shape].split(), *STEPS]
    assert not run(1, *flags, "--save", str(tmp_path / "plain"))
    zero = corpus.let("--teacher-control", "zero")
    assert not run(1, *flags, *zero, "--save", str(tmp_path / "zero"))
    assert hashes(tmp_path / "zero") == hashes(tmp_path / "plain")
