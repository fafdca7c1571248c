"""What a teacher with another tokenizer reads of a batch."""

from types import SimpleNamespace

import numpy as np
import torch

from megatron_let.translation.run import Translation
from megatron_let.upstream.batch import TEACHER_TOKENS


def rows(tokens, start, end):
    made = Translation.__new__(Translation)
    made._args = SimpleNamespace(reset_position_ids=True, reset_attention_mask=True)
    made._translator = SimpleNamespace(start=start, end=end)
    return made.rows([{TEACHER_TOKENS: torch.tensor([tokens])}])


def positions(tokens, start, end):
    return rows(tokens, start, end)["position_ids"][0].tolist()


def test_documents_begin_behind_an_end():
    assert positions([5, 6, 2, 7, 2, 8], [], [2]) == [0, 1, 2, 0, 1, 0]
    mask = rows([5, 6, 2, 7], [], [2])["attention_mask"][0, 0]
    forbidden = [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 0]]
    assert mask.int().tolist() == forbidden


def test_a_start_that_is_the_end_belongs_to_its_text():
    """OPT's: 0 in front of each text and behind it."""
    assert positions([0, 5, 6, 0, 0, 7, 0], [0], [0]) == [0, 1, 2, 3, 0, 1, 2]


def test_all_that_is_in_front_must_follow():
    assert positions([1, 9, 5, 2, 1, 9, 6, 2, 1, 7], [1, 9], [2]) == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]


def test_the_largest_id_is_of_a_token_with_text_or_of_what_stands_around_it():
    made = Translation.__new__(Translation)
    teacher = SimpleNamespace(lengths=np.array([1, 2, 0, 3, 0, 0]))
    for end, largest in ((2, 3), (4, 4)):
        made._translator = SimpleNamespace(teacher=teacher, start=[2], end=[end])
        assert made.largest_id() == largest
