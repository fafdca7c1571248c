import pytest

from megatron_let.teacher.work import micro_batches_at_once, share_per_rank


@pytest.mark.parametrize("rows, ranks, together", [(4, 1, 1), (4, 2, 1), (1, 4, 4), (6, 4, 2)])
def test_micro_batches_at_once(rows, ranks, together):
    assert micro_batches_at_once(rows, ranks) == together


@pytest.mark.parametrize(
    "rows, micro_batches, ranks, share",
    [
        (4, 16, 2, 1 / 2),
        (1, 16, 4, 1 / 4),
        (1, 3, 4, 1 / 3),  # three rows for four ranks: one row each, one of them filled up
        (1, 6, 4, 2 / 6),
        (4, 1, 1, 1.0),
    ],
)
def test_share_per_rank(rows, micro_batches, ranks, share):
    assert share_per_rank(rows, micro_batches, ranks) == pytest.approx(share, rel=1e-12)
