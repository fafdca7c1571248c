import pytest

from megatron_let.errors import UsageError
from megatron_let.planning.run import Layout


def test_ranks():
    layout = Layout(gpus=32, tp=2, pp=4)
    assert (layout.dp, layout.sequence_shards) == (4, 2)
    assert Layout(gpus=32, tp=2, sequence_parallel=False).sequence_shards == 1


@pytest.mark.parametrize(
    "flags, layers",
    [
        ({}, (6, 6, 6, 6)),
        ({"first_stage_layers": 3}, (3, 7, 7, 7)),
        ({"last_stage_layers": 3}, (7, 7, 7, 3)),
        ({"first_stage_layers": 5, "last_stage_layers": 5}, (5, 7, 7, 5)),
        ({"vpp": 2}, (6, 6, 6, 6)),
    ],
)
def test_split(flags, layers):
    assert Layout(gpus=4, pp=4, **flags).split(24) == layers


@pytest.mark.parametrize(
    "flags, layers",
    [
        ({"pp": 5, "gpus": 5}, "24 layers do not divide over 5 .* use --decoder-last.*-layers 4"),
        ({"first_stage_layers": 5}, "with --decoder-first-.* 5. Change --pp, or split evenly"),
        ({"vpp": 4}, "4 pipeline stages of 4 virtual chunks"),
        ({"first_stage_layers": 0}, "--decoder-first-pipeline-num-layers 0"),
        ({"first_stage_layers": 24}, "--decoder-first-pipeline-num-layers 24"),
        ({"last_stage_layers": 30}, "--decoder-last-pipeline-num-layers 30"),
        ({"pp": 32, "gpus": 32}, "Use fewer stages"),
    ],
)
def test_splits_that_megatron_refuses(flags, layers):
    layout = Layout(**{"gpus": 4, "pp": 4} | flags)
    with pytest.raises(UsageError, match=layers):
        layout.split(24)


def test_all_splits_are_valid_and_those_of_few_flags_come_first():
    splits = list(Layout(gpus=4, pp=4).splits(24))
    flags = [layout.split_flags.count("--") for layout in splits]
    assert flags == sorted(flags) and flags[0] == 0
    assert {layout.split(24) for layout in splits} >= {(6, 6, 6, 6), (7, 7, 7, 3), (5, 7, 7, 5)}
    assert all(sum(layout.split(24)) == 24 and min(layout.split(24)) > 0 for layout in splits)
    assert [layout.split(24) for layout in Layout(gpus=1).splits(24)] == [(24,)]


def test_place_of_a_layer():
    assert Layout(gpus=4, pp=4).place(24, 6) == (0, 0)
    assert Layout(gpus=4, pp=4).place(24, 7) == (1, 0)
    assert Layout(gpus=4, pp=4, first_stage_layers=3).place(24, 4) == (1, 0)


def test_place_of_a_layer_in_virtual_chunks():
    # Rounds of 2 stages x 2 layers: layers 1 2 | 3 4, then 5 6 | 7 8.
    interleaved = Layout(gpus=2, pp=2, vpp=2)
    assert [interleaved.place(8, layer) for layer in (2, 3, 5, 8)] == [
        (0, 0), (1, 0), (0, 1), (1, 1),
    ]  # fmt: skip
    # Uneven: stage 0 has 1 layer of each round, stage 1 has 3.
    uneven = Layout(gpus=2, pp=2, vpp=2, first_stage_layers=2)
    assert [uneven.place(8, layer) for layer in (1, 2, 5, 6)] == [(0, 0), (1, 0), (0, 1), (1, 1)]


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"gpus": 30, "pp": 4}, "--gpus 30 is not a multiple of --tp 1 x --pp 4 = 4"),
        ({"gpus": 0}, "--gpus 0 must be at least 1"),
        ({"gpus": 4, "vpp": 2}, "no effect with --pp 1"),
        ({"gpus": 4, "first_stage_layers": 2}, "no effect with --pp 1"),
        ({"gpus": 4, "sequence_parallel": True}, "no effect with --tp 1"),
    ],
)
def test_impossible_layouts(flags, message):
    with pytest.raises(UsageError, match=message):
        Layout(**flags)
