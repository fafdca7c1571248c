import math

import pytest

from megatron_let.methods.schedules import DECAYS, guidance_factor


@pytest.mark.parametrize("done", [0, 1, 300, 599, 600, 10_000])
def test_linear_is_the_papers_formula(done):
    assert guidance_factor(done, 600, "linear") == pytest.approx(
        max(0, (600 - done) / 600), rel=1e-12
    )


@pytest.mark.parametrize("decay", DECAYS)
def test_every_decay_starts_at_one_and_is_zero_from_the_stop_on(decay):
    assert guidance_factor(0, 7, decay) == 1.0
    assert guidance_factor(6, 7, decay) > 0.0
    assert [guidance_factor(done, 7, decay) for done in (7, 8, 100)] == [0.0] * 3


@pytest.mark.parametrize("decay", DECAYS)
def test_no_decay_ever_rises(decay):
    factors = [guidance_factor(done, 50, decay) for done in range(60)]
    assert factors == sorted(factors, reverse=True)


def test_cosine_is_half_way_down_in_the_middle_and_flat_at_both_ends():
    assert guidance_factor(50, 100, "cosine") == pytest.approx(0.5)
    assert guidance_factor(25, 100, "cosine") == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert guidance_factor(1, 100, "cosine") > guidance_factor(1, 100, "linear")
    assert guidance_factor(99, 100, "cosine") < guidance_factor(99, 100, "linear")


def test_step_keeps_full_weight_until_the_stop():
    assert [guidance_factor(done, 3, "step") for done in range(5)] == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_constant_needs_no_stop_and_never_ends():
    assert guidance_factor(10**9, None, "constant") == 1.0
