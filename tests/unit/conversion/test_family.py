"""The rules and their forms, against references written by hand; what the checks refuse."""

import pytest
import torch

from megatron_let.conversion.checks import (
    NOT_HUGGING_FACE_WEIGHTS,
    NOT_WEIGHTS,
    check_names,
    is_not_weight,
    pieces,
    rules_of,
)
from megatron_let.conversion.families import FAMILIES, LLAMA_RULES
from megatron_let.conversion.family import (
    GATED_MLP,
    KEEP,
    QKV,
    QKV_COLUMNS,
    TRANSPOSED,
    VOCABULARY,
    Family,
    Form,
    ModelShape,
    cut_vocabulary,
    split_qkv,
)
from megatron_let.errors import UsageError

NAMES = [rule.megatron for rule in LLAMA_RULES]
FORMS = ["keep", "vocabulary", "qkv", "gated", "transposed", "qkv_columns"]
HEADS, HEAD_DIM, HIDDEN = 4, 3, 8


def model_shape(groups: int = 2, vocab_size: int = 5) -> ModelShape:
    return ModelShape(
        num_layers=2,
        num_heads=HEADS,
        num_query_groups=groups,
        head_dim=HEAD_DIM,
        vocab_size=vocab_size,
    )


def qkv_reference(weight: torch.Tensor, groups: int) -> list[torch.Tensor]:
    """Row by row: each group has its query heads, then one key, then one value."""
    rows: dict[str, list[torch.Tensor]] = {"q": [], "k": [], "v": []}
    row = 0
    for _ in range(groups):
        for kind in ["q"] * (HEADS // groups) + ["k", "v"]:
            rows[kind] += [weight[row + i] for i in range(HEAD_DIM)]
            row += HEAD_DIM
    assert row == len(weight)
    return [torch.stack(rows[kind]) for kind in "qkv"]


@pytest.mark.parametrize("groups", [1, 2, HEADS])
def test_split_qkv_matches_reference(groups: int) -> None:
    weight = torch.randn((HEADS + 2 * groups) * HEAD_DIM, HIDDEN)
    parts = split_qkv(weight, model_shape(groups))
    for part, expected in zip(parts, qkv_reference(weight, groups), strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize("groups", [2, HEADS])
def test_reference_catches_a_wrong_interleaving(groups: int) -> None:
    """Twin: all queries, then all keys, then all values, is right for one group only."""
    weight = torch.randn((HEADS + 2 * groups) * HEAD_DIM, HIDDEN)
    wrong = weight.split([HEADS * HEAD_DIM, groups * HEAD_DIM, groups * HEAD_DIM])
    for part, expected in zip(wrong, qkv_reference(weight, groups), strict=True):
        assert part.shape == expected.shape
        assert not torch.equal(part, expected)


def test_attention_of_the_split_matches_megatrons_grouping() -> None:
    """Query head i of the split reads key head i // (n/g), as Hugging Face repeats them."""
    groups, per_group = 2, HEADS // 2
    weight = torch.randn((HEADS + 2 * groups) * HEAD_DIM, HIDDEN)
    states = torch.randn(6, HIDDEN)
    mixed = (states @ weight.T).view(6, groups, per_group + 2, HEAD_DIM)
    expected = torch.einsum("sgpd,tgd->gpst", mixed[:, :, :per_group], mixed[:, :, per_group])

    query, key, _ = (states @ part.T for part in split_qkv(weight, model_shape(groups)))
    query = query.view(6, HEADS, HEAD_DIM)
    key = key.view(6, groups, HEAD_DIM).repeat_interleave(per_group, dim=1)
    scores = torch.einsum("snd,tnd->nst", query, key)
    torch.testing.assert_close(scores, expected.flatten(0, 1))


def test_split_qkv_refuses_other_numbers_of_heads() -> None:
    with pytest.raises(UsageError, match="25 rows; 4 heads of 3 in 2 groups make 24"):
        split_qkv(torch.zeros(25, HIDDEN), model_shape())


def test_split_gated_mlp_gives_gate_then_up() -> None:
    gate, up = torch.randn(6, HIDDEN), torch.randn(6, HIDDEN)
    parts = GATED_MLP.split(torch.cat([gate, up]), model_shape())
    assert torch.equal(parts[0], gate) and torch.equal(parts[1], up)


def test_cut_vocabulary() -> None:
    table = torch.randn(8, HIDDEN)
    (cut,) = cut_vocabulary(table, model_shape(vocab_size=5))
    assert torch.equal(cut, table[:5])
    with pytest.raises(UsageError, match="has 9 tokens and the model 8 rows"):
        cut_vocabulary(table, model_shape(vocab_size=9))


@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("columns", [(), (HIDDEN,)], ids=["bias", "weight"])
@pytest.mark.parametrize(
    "form", [KEEP, VOCABULARY, QKV, GATED_MLP, TRANSPOSED, QKV_COLUMNS], ids=FORMS
)
def test_join_undoes_split(form: Form, columns: tuple[int, ...], groups: int) -> None:
    shape = model_shape(groups, vocab_size=(HEADS + 2 * groups) * HEAD_DIM)
    if form is QKV_COLUMNS:  # GPT-2 knows no groups
        shape = model_shape(HEADS)
    rows = (HEADS + 2 * shape.num_query_groups) * HEAD_DIM
    weight = torch.randn(rows, *columns)
    parts = form.split(weight, model_shape(shape.num_query_groups, vocab_size=rows))
    assert torch.equal(form.join(parts, shape), weight)


def test_gpt2_keeps_columns() -> None:
    """Query, key and value side by side, `[in, out]`, as `Conv1D` multiplies."""
    weight, states = torch.randn(3 * HEADS * HEAD_DIM, HIDDEN), torch.randn(6, HIDDEN)
    shape = model_shape(HEADS)
    (columns,) = QKV_COLUMNS.split(weight, shape)
    expected = torch.cat([states @ part.T for part in split_qkv(weight, shape)], dim=1)
    torch.testing.assert_close(states @ columns, expected)
    assert not torch.equal(columns, weight.t())  # twin: Megatron's own order


def test_names_of_each_layer() -> None:
    rule = next(rule for rule in LLAMA_RULES if rule.megatron.endswith("linear_fc1.weight"))
    stacked = torch.randn(2, 12, HIDDEN)
    assert pieces([rule], model_shape()) == [(rule, 0), (rule, 1)]
    parts = dict(rule.split(stacked[1], 1, model_shape()))
    assert list(parts) == [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up")]
    assert torch.equal(parts["model.layers.1.mlp.up_proj.weight"], stacked[1, 6:])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_tables_name_every_tensor_once(family: Family) -> None:
    ours = [rule.megatron for rule in family.rules]
    theirs = [name for rule in family.rules for name in rule.hugging_face]
    assert len(set(ours)) == len(ours) and len(set(theirs)) == len(theirs)
    assert len(rules_of(family.rules, tied=True)) == len(family.rules) - 1


def test_what_is_no_weight() -> None:
    others = [
        "decoder.layers.self_attention.linear_qkv._extra_state/shard_0_4",
        "decoder.layers.let_resize.weight",
        "optimizer.state.exp_avg.output_layer.weight",
        "chained_1.optimizer.state.exp_avg.output_layer.weight",
        "rng_state/shard_0.0_1.1",
        "rerun_state_machine_state/shard_0_1",
        "common_state/shard_0_1",
    ]
    assert all(is_not_weight(name, NOT_WEIGHTS) for name in others)
    assert not any(is_not_weight(rule.megatron, NOT_WEIGHTS) for f in FAMILIES for rule in f.rules)
    check_names(NAMES, [*NAMES, *others], "the checkpoint", NOT_WEIGHTS)
    for family in FAMILIES:
        theirs = [name for rule in family.rules for name in rule.hugging_face]
        assert not any(is_not_weight(name, NOT_HUGGING_FACE_WEIGHTS) for name in theirs)


def test_missing_and_left_over_tensors_are_named() -> None:
    with pytest.raises(UsageError, match="a Llama, lacks output_layer.weight"):
        check_names(NAMES, NAMES[:-1], "a Llama,", NOT_WEIGHTS)
    with pytest.raises(UsageError, match="beside the weights of that, decoder.layers.mlp.router"):
        check_names(NAMES, [*NAMES, "decoder.layers.mlp.router.weight"], "it", NOT_WEIGHTS)
