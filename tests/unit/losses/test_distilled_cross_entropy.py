"""The distilled cross-entropy on vocabulary shards against whole logits in float64.

Tolerance 1e-5 absolute on losses and gradients of order one, float32.
"""

import numpy as np
import pytest

from tests.support.testing import run_distributed

FUNCTION = "tests.unit.losses.shards:losses_and_gradient"
CASES = {
    "warm teacher": {"weight": 0.7, "temperature": 2.0},
    "distillation alone": {"weight": 1.0, "temperature": 1.0},
    "padded teacher": {"weight": 0.5, "temperature": 1.0, "known": 37},
    "a shard of padding": {"weight": 0.5, "temperature": 1.0, "known": 20},
    "in one part": {"weight": 0.5, "temperature": 1.0, "parts": 1},
    "gated": {"weight": 0.7, "temperature": 1.0, "known": 37, "gated": True},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_and_gradient(name, ranks):
    [expected] = run_distributed("tests.unit.losses.shards:written_out", 1, **CASES[name])
    parts = run_distributed(FUNCTION, ranks, **CASES[name])
    for key in ("total", "lm", "kd", "teacher", "is_better"):
        for part in parts:
            np.testing.assert_allclose(part[key], expected[key], atol=1e-5)
    gradient = np.concatenate([part["gradient"] for part in parts], axis=-1)
    np.testing.assert_allclose(gradient, expected["gradient"], atol=1e-5)
    assert all(part["kept"] == gradient.size // ranks for part in parts), "one buffer is kept"
    assert 0 < expected["is_better"].mean() < 1, "the teacher is better on some tokens"


def test_a_teacher_like_the_student_has_no_divergence():
    [found] = run_distributed(FUNCTION, 1, weight=1.0, temperature=1.0, same=True)
    np.testing.assert_allclose(found["kd"], 0, atol=1e-5)
    np.testing.assert_allclose(found["gradient"], 0, atol=1e-5)


# --- memory -------------------------------------------------------------------------------------

PEAK = "tests.unit.losses.shards:peak_shards"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_most_one_more_shard_of_logits_than_in_plain_training(dtype):
    sizes = {"tokens": 1024, "vocab": 512, "dtype": dtype}
    [plain] = run_distributed(PEAK, 1, distilled=False, **sizes)
    [distilled] = run_distributed(PEAK, 1, distilled=True, **sizes)
    [whole] = run_distributed(PEAK, 1, distilled=True, parts=1, **sizes)
    print(f"{dtype}: peak {plain:.2f} shards, distilled {distilled:.2f}, in one part {whole:.2f}")
    assert plain < distilled <= plain + 1
    assert whole > plain + 2, "the twin: without parts the teacher's logits are seen"
