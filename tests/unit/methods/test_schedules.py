import math

import pytest

from megatron_let.methods.schedules import DECAYS, distillation_weight, guidance_factor


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


# --- distillation -------------------------------------------------------------------------------


def test_distillation_without_a_stop_keeps_its_weight():
    assert [distillation_weight(0.4, step, None, "step") for step in (0, 1000)] == [0.4, 0.4]


@pytest.mark.parametrize("decay", ["step", "linear", "ratio-linear"])
def test_distillation_begins_at_its_weight_and_ends_at_the_stop(decay):
    assert distillation_weight(0.6, 0, 10, decay) == pytest.approx(0.6)
    assert distillation_weight(0.6, 9, 10, decay) > 0
    assert distillation_weight(0.6, 10, 10, decay) == distillation_weight(0.6, 11, 10, decay) == 0


def test_ratio_of_the_two_losses_falls_linearly():
    weights = [distillation_weight(0.75, step, 4, "ratio-linear") for step in range(5)]
    ratios = [weight / (1 - weight) for weight in weights]
    assert ratios == pytest.approx([3.0, 2.25, 1.5, 0.75, 0.0])
