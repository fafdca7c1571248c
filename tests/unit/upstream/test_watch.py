"""What is seen of tensors without contents: bytes, FLOPs, collectives."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_let.upstream.dry import Watch, bytes_of


@pytest.fixture
def watch():
    watch = Watch()
    with FakeTensorMode(), watch:
        yield watch


def test_bytes_live_until_nothing_holds_them(watch):
    first = torch.empty(1000)
    view = first.view(10, 100)[3:]
    second = first + 1
    assert watch.now == watch.peak == 8000
    del first, second
    gc.collect()
    assert watch.now == 4000 and watch.peak == 8000  # the view holds the whole
    assert bytes_of([view, view]) == 4000
    del view
    assert watch.now == 0


def test_flops(watch):
    torch.empty(8, 16) @ torch.empty(16, 32)
    assert watch.flops == 2 * 8 * 16 * 32
    query = torch.empty(2, 4, 64, 16)
    watch.flops = 0
    F.scaled_dot_product_attention(query, query, query)
    square, watch.flops = watch.flops, 0
    F.scaled_dot_product_attention(query, query, query, is_causal=True)
    assert square == 2 * watch.flops == 2 * 2 * 2 * 4 * 64 * 64 * 16


def test_what_the_host_reads_is_zero(watch):
    assert torch.empty(1).item() == 0.0 and torch.empty(1, dtype=torch.int).item() == 0
    assert not torch.empty(1, dtype=torch.bool)
    assert torch.tensor(3).item() == 3  # a number that the host made, it knows
