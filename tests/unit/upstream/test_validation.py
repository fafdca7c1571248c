"""Whole validation sets: every row once, as many batches of one size on every rank."""

import itertools
from argparse import Namespace

import pytest
from megatron.training.datasets.data_samplers import MegatronFullValidationSampler

from megatron_let.upstream import datasets
from megatron_let.upstream.datasets import whole_set


def is_exact(sampler, total, ranks):
    """Whether all ranks together give each row once, in as many batches of one size."""
    batches = [list(sampler(total, rank, ranks)) for rank in range(ranks)]
    rows = [row for own in batches for batch in own for row in batch if row is not None]
    shapes = {tuple(map(len, own)) for own in batches}
    return sorted(rows) == list(range(total)) and len(shapes) == 1


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_every_row_comes_once_and_no_rank_ends_before_the_others(monkeypatch, rows):
    monkeypatch.setattr(datasets, "get_args", lambda: Namespace(eval_micro_batch_size=rows))
    for ranks, total in itertools.product((1, 2, 3), range(1, 60)):
        assert is_exact(whole_set, total, ranks)
        own = whole_set(total, ranks - 1, ranks)
        assert {len(batch) for batch in own} == {rows}
        assert len(own) == len(list(own)) == -(-total // (rows * ranks))


def test_megatrons_own_ends_before_the_others():
    """The twin."""
    assert is_exact(MegatronFullValidationSampler, 6, 2)
    assert not is_exact(MegatronFullValidationSampler, 7, 2)


RUN = {
    "skip_train": False,
    "train_samples": None,
    "train_iters": 8,
    "iteration": 4,
    "consumed_train_samples": 32,
    "global_batch_size": 8,
    "eval_interval": 3,
    "start_eval_at_iter": None,
    "eval_iters": 2,
    "eval_global_batch_size": 8,
    "consumed_valid_samples": 16,
}
FRESH = {"iteration": 0, "consumed_train_samples": 0, "consumed_valid_samples": 0}


@pytest.mark.parametrize(
    "changed, train, valid",
    [
        ({}, 64, 48),  # as upstream counts
        ({"global_batch_size": 4}, 32 + 4 * 4, 48),
        ({"eval_iters": 1}, 64, 16 + 2 * 8),
        ({"eval_interval": 8}, 64, 16 + 2 * 16),
        ({"start_eval_at_iter": 3, **FRESH}, 64, 3 * 16),
        ({"start_eval_at_iter": 9, **FRESH}, 64, 16),
        ({"iteration": 9, "consumed_train_samples": 72}, 72, 16 + 16),
        ({"eval_iters": 0}, 64, 0),  # a set may be too small for any
        ({"skip_train": True}, 0, 0),
    ],
)
def test_samples_suffice_for_what_is_left(monkeypatch, changed, train, valid):
    """A run of 8 steps, 4 of which and one of its 3 evaluations have been made."""
    args = Namespace(**RUN | changed)
    monkeypatch.setattr(datasets, "get_args", lambda: args)
    count = datasets._with_what_is_left(lambda: (0, 0, 5))
    assert count() == (train, valid, 5)
