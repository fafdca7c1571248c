"""Whole validation sets: every row once, as many batches on every rank."""

import itertools
from argparse import Namespace

import pytest
from megatron.training.datasets.data_samplers import MegatronFullValidationSampler

from megatron_let.upstream import validation
from megatron_let.upstream.validation import WholeSet


def is_exact(sampler, total, ranks):
    """Whether all ranks together give each row once, in as many batches each."""
    batches = [list(sampler(total, rank, ranks)) for rank in range(ranks)]
    rows = sorted(row for own in batches for batch in own for row in batch)
    return rows == list(range(total)) and len({len(own) for own in batches}) == 1


@pytest.mark.parametrize("rows", [2, 3, 8])
def test_every_row_comes_once_and_no_rank_ends_before_the_others(monkeypatch, rows):
    monkeypatch.setattr(validation, "get_args", lambda: Namespace(eval_micro_batch_size=rows))
    for ranks, most in itertools.product((1, 2, 3), range(2, 30)):
        for total in range((most - 1) * ranks + 1, most * ranks + 1):
            assert is_exact(WholeSet, total, ranks)
            own = WholeSet(total, ranks - 1, ranks)
            assert len(own) == len(list(own)) == -(-most // rows)
            assert max(map(len, own)) <= rows


def test_megatrons_own_ends_before_the_others(monkeypatch):
    """The twin, and why one row at a time has the same flaw."""
    monkeypatch.setattr(validation, "get_args", lambda: Namespace(eval_micro_batch_size=1))
    for sampler in (MegatronFullValidationSampler, WholeSet):
        assert is_exact(sampler, 6, 2)
        assert not is_exact(sampler, 7, 2)
