"""Counts are exact integers in floating point, so equality is asked for."""

import pytest

from megatron_let.planning.shapes import student_shape, teacher_shape
from megatron_let.teacher.work import window_ends


def test_llama_students(student):
    # A layer: 2 x (4 x 2048^2 + 3 x 2048 x 5504) + 2 x 2048 x 2048 of attention
    assert student.layer_flops_per_token(2048) == 109_576_192
    # 3 x (24 layers + 2 x 2048 x 49152)
    assert student.training_flops_per_token(2048) == 8_493_465_600


def test_grouped_queries():
    # As num_floating_point_operations over the tokens of a batch, s = 2048: MLP 6 x 2048 x 8192
    # x 3, projections 6 x 2048 x (2048 + 2 x 512 + 2048), scores 6 x 2048 x 2048, 16 layers;
    # logits 6 x 2048 x 128256.
    llama = teacher_shape("llama-3.2-1b")
    expected = 16 * (301_989_888 + 62_914_560 + 25_165_824) + 1_576_009_728
    assert llama.training_flops_per_token(2048) == expected == 7_817_134_080


def test_gelu():
    # 12 layers of 6 x (4 x 768^2 + 2 x 768 x 3072) + 6 x 768 x 1024; logits 6 x 768 x 50304.
    changes = {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12}
    gpt = student_shape(None, vocab_size=50304, changes=changes)
    expected = 12 * (42_467_328 + 4_718_592) + 231_800_832
    assert gpt.training_flops_per_token(1024) == expected == 798_031_872


def test_the_teachers_states_cost_no_head(teacher):
    # 30 layers of 2 x (576 x (2 x 576 + 2 x 192) + 3 x 576 x 1536) + 2 x 576 x 2048
    assert teacher.states_flops_per_token(2048, 2048) == 30 * 9_437_184


@pytest.mark.parametrize(
    "seq_length, context, tokens",
    [(2048, 2048, 2048), (100, 2048, 100), (4096, 2048, 3 * 2048), (2049, 2048, 2 * 2048)],
)
def test_tokens_read_in_windows(seq_length, context, tokens):
    assert min(seq_length, context) * len(window_ends(seq_length, context)) == tokens


def test_long_sequences_are_read_in_windows(teacher):
    # Three windows of 2048 for 4096 tokens, attention within a window.
    in_context = teacher.states_flops_per_token(2048, 2048)
    assert teacher.states_flops_per_token(4096, 4096) == 1.5 * in_context


def test_rows_of_a_teacher_with_another_tokenizer(teacher):
    layers = 30 * 2 * (576 * (2 * 576 + 2 * 192) + 3 * 576 * 1536)
    attention = 30 * 2 * 576 * 1024  # over half of a row of 1024
    assert teacher.states_flops_per_token(2048, 1024) == 0.5 * (layers + attention)
