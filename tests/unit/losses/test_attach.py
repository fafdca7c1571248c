"""The attached gradient equals the written-out one, without Megatron.

A layer (a matrix), the attachment, a head: the loss is `head + scale * sum(mask * (1 - cos))`.
Tolerance: 1e-6 relative on float64, so that a wrong factor or an extra term cannot pass.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from megatron_let.errors import UsageError
from megatron_let.losses.attach import Alignment, Resize, Target, interpolate

S, B, H, T = 5, 2, 8, 12


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_resize(kind="interpolate"):
    return Resize(kind, student_width=H, teacher_width=T).double()


def exact_cosine(student_SBH, teacher_SBH):
    """The loss in float64; the library's own is float32."""
    return 1 - F.cosine_similarity(student_SBH, teacher_SBH, dim=-1)


def make_target(seed=10, scale=3.0):
    mask_SB = (randn(seed + 1, S, B) > -0.3).double()
    return Target(randn(seed, S, B, T), mask_SB, torch.tensor(scale, dtype=torch.float64))


def loss_by_hand(activation_SBH, target, resize):
    loss_SB = exact_cosine(activation_SBH, resize(target.states_SBT))
    return target.scale * (loss_SB * target.mask_SB).sum()


class Student:
    """Two matrices; `attach` sits between them."""

    def __init__(self):
        self.layer = randn(0, H, H).requires_grad_()
        self.head = randn(1, H, H).requires_grad_()
        self.weights = [self.layer, self.head]

    def hidden(self, x_SBH):
        return torch.tanh(x_SBH @ self.layer)

    def loss(self, hidden_SBH):
        return (hidden_SBH @ self.head).square().mean()


def attached_gradients(alignment, resize, inputs, *, use_checkpoint=False):
    """Gradients of layer, head and map over all inputs, forward passes first, then backward."""
    student = Student()

    def run(x_SBH):
        hidden_SBH = student.hidden(x_SBH)
        if torch.is_grad_enabled():
            hidden_SBH = alignment.attach(hidden_SBH, resize)
        return hidden_SBH

    losses = []
    for x_SBH in inputs:
        hidden_SBH = checkpoint(run, x_SBH, use_reentrant=True) if use_checkpoint else run(x_SBH)
        losses.append(student.loss(hidden_SBH))
    for loss in losses:  # one at a time, as a pipeline schedule does
        loss.backward()
    return [weight.grad for weight in (*student.weights, *resize.parameters())]


def written_out_gradients(targets, resize, inputs):
    student = Student()
    losses = []
    for x_SBH, target in zip(inputs, targets, strict=True):
        hidden_SBH = student.hidden(x_SBH)
        losses.append(student.loss(hidden_SBH) + loss_by_hand(hidden_SBH, target, resize))
    return torch.autograd.grad(sum(losses), [*student.weights, *resize.parameters()])


def assert_equal(actual, expected):
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-9)


def make_alignment(*targets):
    alignment = Alignment(exact_cosine)
    for target in targets:
        alignment.push(target)
    return alignment


def mean(*states):
    return exact_cosine(*states).mean()


def of_one_feature(*states):
    return exact_cosine(*states)[..., None]


@pytest.mark.parametrize("loss", [mean, of_one_feature])
def test_a_loss_that_is_none_of_each_token_is_refused(loss):
    alignment = Alignment(loss)
    alignment.push(make_target())
    with pytest.raises(UsageError, match=r"returns \[.*a loss for each token, \[5, 2\]"):
        alignment.attach(randn(2, S, B, H), make_resize())


@pytest.mark.parametrize("kind", ["interpolate", "linear"])
def test_gradient_is_that_of_the_written_out_loss(kind):
    resize, target, inputs = make_resize(kind), make_target(), [randn(2, S, B, H)]
    actual = attached_gradients(make_alignment(target), resize, inputs)
    assert_equal(actual, written_out_gradients([target], resize, inputs))


def test_a_wrong_scale_is_noticed():
    resize, inputs = make_resize("linear"), [randn(2, S, B, H)]
    actual = attached_gradients(make_alignment(make_target(scale=3.0)), resize, inputs)
    expected = written_out_gradients([make_target(scale=3.001)], resize, inputs)
    with pytest.raises(AssertionError):
        assert_equal(actual, expected)


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_each_micro_batch_meets_its_own_target(use_checkpoint):
    """First in, first out: with recomputation too, where all forward passes come first."""
    resize, inputs = make_resize("linear"), [randn(i, S, B, H).requires_grad_() for i in (2, 3, 4)]
    targets = [make_target(seed) for seed in (10, 20, 30)]
    alignment = make_alignment(*targets)
    actual = attached_gradients(alignment, resize, inputs, use_checkpoint=use_checkpoint)
    assert_equal(actual, written_out_gradients(targets, resize, inputs))
    assert len(alignment) == 0
    # The twin: last in, first out.
    alignment = make_alignment(*reversed(targets))
    swapped = attached_gradients(alignment, make_resize("linear"), inputs)
    with pytest.raises(AssertionError):
        assert_equal(swapped, actual)


def test_recomputation_counts_the_loss_once():
    target, x_SBH = make_target(), randn(2, S, B, H).requires_grad_()
    alignment = make_alignment(target)
    attached_gradients(alignment, make_resize(), [x_SBH], use_checkpoint=True)
    expected = loss_by_hand(Student().hidden(x_SBH), target, make_resize()) / target.scale
    assert alignment.micro_batches == 1
    torch.testing.assert_close(alignment.sums["loss"], expected.detach())


def test_values_are_unchanged_bit_for_bit():
    x_SBH = randn(2, S, B, H).float().requires_grad_()
    target = make_target()
    target.states_SBT = target.states_SBT.float()
    alignment = make_alignment(target)
    assert torch.equal(alignment.attach(x_SBH, make_resize().float()), x_SBH)


def test_without_a_target_the_activation_itself_comes_back():
    x_SBH = randn(2, S, B, H).requires_grad_()
    assert make_alignment().attach(x_SBH, make_resize()) is x_SBH


def test_without_a_target_a_learned_map_gets_a_zero_gradient():
    """Not none: a data-parallel bucket waits for the gradient of every weight."""
    x_SBH, resize = randn(2, S, B, H).requires_grad_(), make_resize("linear")
    attached_SBH = make_alignment().attach(x_SBH, resize)
    assert torch.equal(attached_SBH, x_SBH)
    attached_SBH.sum().backward()
    assert torch.equal(resize.weight.grad, torch.zeros_like(resize.weight))
    assert torch.equal(x_SBH.grad, torch.ones_like(x_SBH))


def test_masked_tokens_get_no_gradient():
    x_SBH, target = randn(2, S, B, H).requires_grad_(), make_target()
    attached_SBH = make_alignment(target).attach(x_SBH, make_resize())
    (0.0 * attached_SBH).sum().backward()
    masked = target.mask_SB == 0
    assert masked.any() and not masked.all()
    assert not x_SBH.grad[masked].any()
    assert x_SBH.grad[~masked].any()


def test_record_sums_losses_tokens_and_both_gradients():
    targets, resize = [make_target(10), make_target(20)], make_resize()
    alignment = make_alignment(*targets)
    losses, squares = [], []
    for seed, target in enumerate(targets):
        x_SBH = randn(seed, S, B, H).requires_grad_()
        alignment.attach(x_SBH, resize).sum().backward()
        by_hand = loss_by_hand(x_SBH, target, resize)
        losses.append(by_hand / target.scale)
        squares.append(torch.autograd.grad(by_hand, x_SBH)[0].square().sum())

    assert alignment.micro_batches == 2
    assert alignment.sums["tokens"] == sum(target.mask_SB.sum() for target in targets)
    assert alignment.sums["lm_gradient_square"] == 2 * S * B * H
    torch.testing.assert_close(alignment.sums["loss"], sum(losses).detach())
    torch.testing.assert_close(
        alignment.sums["let_gradient_square"], sum(squares), check_dtype=False, rtol=1e-5, atol=0
    )


def test_start_of_a_step_forgets_what_an_interrupted_one_left():
    alignment = make_alignment(make_target(), make_target())
    alignment.attach(randn(2, S, B, H).requires_grad_(), make_resize())
    alignment.start_step()
    assert (len(alignment), alignment.micro_batches, alignment.sums) == (0, 0, {})


def test_teacher_states_of_the_student_cost_nothing():
    """Identity: the student's own states as teacher give loss 0; shifted by one, they do not."""
    x_SBH = randn(2, S, B, H).requires_grad_()
    resize = Resize("interpolate", student_width=H, teacher_width=H)
    ones, scale = torch.ones(S, B), torch.tensor(1.0)
    own_SBH = x_SBH.detach()
    alignment = make_alignment(
        Target(own_SBH, ones, scale), Target(own_SBH.roll(1, 0), ones, scale)
    )
    alignment.attach(x_SBH, resize)
    assert alignment.sums["loss"].abs() < 1e-12
    alignment.attach(x_SBH, resize)
    assert alignment.sums["loss"] > 0.5 * S * B
    assert interpolate(own_SBH, H) is own_SBH
