import numpy as np
import pytest
import torch

from megatron_let.losses.attach import Resize, interpolate


def states(seed, width):
    return torch.randn(3, 2, width, generator=torch.Generator().manual_seed(seed))


def by_hand(vector, width):
    """Linear interpolation between feature centres (align_corners False), edges repeated."""
    old = len(vector)
    centres = (np.arange(width) + 0.5) * old / width - 0.5
    return np.interp(centres, np.arange(old), vector)


@pytest.mark.parametrize(("old", "new"), [(48, 32), (32, 48), (8, 16), (16, 8), (7, 5), (1, 4)])
def test_interpolation_equals_one_by_hand(old, new):
    states_SBH = states(0, old).double()
    resized_SBH = interpolate(states_SBH, new)
    assert resized_SBH.shape == (3, 2, new)
    expected = np.apply_along_axis(by_hand, -1, states_SBH.numpy(), new)
    np.testing.assert_allclose(resized_SBH, expected, atol=1e-12)


def test_interpolation_does_not_pin_the_first_and_last_feature():
    """The twin: align_corners True would map first to first and last to last."""
    assert interpolate(torch.tensor([[[0.0, 1.0]]]), 4).tolist() == [[[0.0, 0.25, 0.75, 1.0]]]
    corners = by_hand(np.array([0.0, 1.0, 2.0, 3.0]), 2)
    assert interpolate(torch.tensor([[[0.0, 1.0, 2.0, 3.0]]]), 2).tolist() == [[corners.tolist()]]
    assert corners.tolist() == [0.5, 2.5]


def test_equal_widths_come_back_as_they_are():
    states_SBH = states(0, 16)
    assert interpolate(states_SBH, 16) is states_SBH


@pytest.mark.parametrize("kind", ["interpolate", "linear"])
def test_the_teachers_states_get_the_students_width(kind):
    resize = Resize(kind, student_width=16, teacher_width=24)
    assert resize(states(1, 24)).shape == (3, 2, 16)


def test_only_the_learned_map_has_weights():
    assert list(Resize("interpolate", student_width=16, teacher_width=24).parameters()) == []


def test_map_is_a_matrix_product():
    resize = Resize("linear", student_width=16, teacher_width=24)
    teacher = resize(states(1, 24))
    torch.testing.assert_close(teacher, states(1, 24) @ resize.weight.T)


def test_map_takes_states_of_another_precision():
    resize = Resize("linear", student_width=16, teacher_width=24)
    teacher = resize(states(1, 24).bfloat16())
    assert teacher.dtype == torch.float32


def test_map_is_the_same_whatever_the_generator_and_leaves_it_as_found():
    sizes = {"student_width": 16, "teacher_width": 24}
    torch.manual_seed(1)
    first = Resize("linear", **sizes).weight
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = Resize("linear", **sizes).weight
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_map_keeps_the_size_of_what_it_maps():
    """Variance of the output is that of the input, within 10 % at width 512."""
    resize = Resize("linear", student_width=512, teacher_width=512)
    teacher = resize(states(1, 512))
    assert teacher.std().item() == pytest.approx(1.0, rel=0.1)
