"""The distilled cross-entropy on vocabulary shards against whole logits in float64.

Tolerance 1e-5 absolute on losses and gradients of order one, float32.
"""

import numpy as np
import pytest

from megatron_let.testing import run_distributed

FUNCTION = "tests.unit.distillation.shards:losses_and_gradient"
CASES = {
    "teacher's side": {"weight": 0.7, "temperature": 2.0, "both_sides": False},
    "both sides": {"weight": 0.7, "temperature": 2.0, "both_sides": True},
    "distillation alone": {"weight": 1.0, "temperature": 1.0, "both_sides": False},
    "padded teacher": {"weight": 0.5, "temperature": 1.0, "both_sides": False, "known": 37},
    "a shard of padding": {"weight": 0.5, "temperature": 1.0, "both_sides": False, "known": 20},
    "many chunks": {"weight": 0.5, "temperature": 1.0, "both_sides": False, "chunk": 3},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_and_gradient(name, ranks):
    [expected] = run_distributed("tests.unit.distillation.shards:written_out", 1, **CASES[name])
    parts = run_distributed(FUNCTION, ranks, **CASES[name])
    for key in ("total", "lm", "kd"):
        for part in parts:
            np.testing.assert_allclose(part[key], expected[key], atol=1e-5)
    gradient = np.concatenate([part["gradient"] for part in parts], axis=-1)
    np.testing.assert_allclose(gradient, expected["gradient"], atol=1e-5)
    assert all(part["kept"] == gradient.size // ranks for part in parts), "one buffer is kept"


def test_a_teacher_like_the_student_has_no_divergence():
    [found] = run_distributed(FUNCTION, 1, weight=1.0, temperature=1.0, both_sides=False, same=True)
    np.testing.assert_allclose(found["kd"], 0, atol=1e-5)
    np.testing.assert_allclose(found["gradient"], 0, atol=1e-5)
