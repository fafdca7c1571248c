import pytest

from megatron_let.errors import UsageError
from megatron_let.planning.shapes import padded_vocab_size, student_shape

SMALL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "preset, vocab_size, parameters",
    [
        # 1.4b: 24 x (4 x 2048^2 + 3 x 2048 x 5504 + 2 x 2048) + 2048 + 2 x 2048 x vocabulary
        ("1.4b", 49152, 1_415_677_952),
        ("1.4B", 50304, 1_420_396_544),
        ("3b", 49152, 2_789_378_560),
        ("7b", 50304, 6_888_361_984),
    ],
)
def test_parameters_of_the_students(preset, vocab_size, parameters):
    assert student_shape(preset, vocab_size=vocab_size).parameters == parameters


def test_without_a_preset_the_style_is_megatrons_default():
    shape = student_shape(None, vocab_size=128, changes=SMALL | {"position_rows": 32})
    # Tied GELU with biases and LayerNorm: weights 4 x 64^2 + 2 x 64 x 256, biases 4 x 64 + 256 +
    # 64, norms 4 x 64; then the final norm, 32 positions and the embedding.
    layer = 4 * 4096 + 2 * 64 * 256 + 4 * 64 + 320 + 256
    assert shape.layer_parameters == layer
    assert shape.parameters == 2 * layer + 2 * 64 + 32 * 64 + 128 * 64
    # Output biases and norms are on every tensor-parallel rank.
    assert shape.layer_replicated_parameters == 64 + 64 + 256


def test_changes_of_a_preset():
    shape = student_shape("1.4b", vocab_size=128, changes={"num_query_groups": 4, "num_layers": 2})
    # Keys and values shrink from 2048 to 4 x 128 each.
    assert shape.layer_matrix_parameters == 2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 5504
    assert shape.name == "1.4b changed"
    assert student_shape("1.4b", vocab_size=128, changes={"num_layers": None}).name == "1.4b"


def test_sizes_that_megatron_derives():
    gated = student_shape(None, vocab_size=128, changes=SMALL | {"gated": True})
    assert gated.ffn_hidden_size == 128  # int(4 x 64 x 2 / 3 / 64) x 64
    assert gated.kv_channels == 16 and gated.num_query_groups == 4


def test_padded_vocab_size():
    assert padded_vocab_size(50257, tp=1) == 50304
    assert padded_vocab_size(50257, tp=4) == 50688
    assert padded_vocab_size(49152, tp=8) == 49152


@pytest.mark.parametrize(
    "preset, changes, message",
    [
        ("2b", {}, "--student 2b is unknown. Choose 1.4b, 3b, 7b"),
        (None, {"num_layers": 2}, "no --hidden-size --num-attention-heads"),
        (None, SMALL | {"num_attention_heads": 5}, "--hidden-size 64 does not divide"),
        (None, SMALL | {"num_attention_heads": 0}, "--hidden-size 64 does not divide"),
        ("1.4b", {"num_layers": 0}, "num_layers 0 must be at least 1"),
        ("1.4b", {"num_query_groups": 3}, "16 attention heads cannot share 3"),
    ],
)
def test_impossible_students(preset, changes, message):
    with pytest.raises(UsageError, match=message):
        student_shape(preset, vocab_size=128, changes=changes)


def test_a_vocabulary_must_be_there():
    with pytest.raises(UsageError, match="--vocab-size 0"):
        padded_vocab_size(0, tp=1)
