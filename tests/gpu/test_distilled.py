"""The distilled cross-entropy, compiled on a GPU, against the CPU's: `pytest -m gpu`."""

import pytest
import torch
import torch.distributed as dist

from megatron_let.losses.distilled_cross_entropy import TeacherHead, distilled_cross_entropy

pytestmark = pytest.mark.gpu
TOLERANCE = 1e-4
"""Absolute, of losses of about 10 nats and of gradients up to 1, float32; sums of 1,000 terms."""
TOKENS, VOCAB, KNOWN, WIDTH = 48, 1000, 990, 16


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def losses_and_gradient(device, group, weight, gated=False):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(TOKENS, 1, VOCAB, generator=generator)
    states = torch.randn(TOKENS, 1, WIDTH, generator=generator)
    rows = torch.randn(VOCAB, WIDTH, generator=generator)
    labels = torch.randint(0, VOCAB, (TOKENS, 1), generator=generator)
    head = TeacherHead(rows.to(device), None, KNOWN, 0, 2.0)
    leaf = logits.to(device).requires_grad_()
    inputs = leaf * 1.0, labels.to(device), states.to(device)
    found = distilled_cross_entropy(*inputs, head, weight, group, 20, gated)  # 20, 20 and 8
    found.total.sum().backward()
    return [tensor.detach().cpu() for tensor in (*found, leaf.grad)]


def test_compiled_losses_are_those_of_the_cpu(group):
    results = {}
    for weight in (0.7, 0.3, 1.0):
        results[weight] = losses_and_gradient("cuda", group, weight)
        expected = losses_and_gradient("cpu", group, weight)
        for ours, theirs in zip(results[weight], expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
    gated = [losses_and_gradient(device, group, 0.7, gated=True) for device in ("cuda", "cpu")]
    for ours, theirs in zip(*gated, strict=True):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
    difference = (results[0.7][-1] - results[0.3][-1]).abs().max()
    assert difference > 100 * TOLERANCE, "the twin: another weight is seen"
