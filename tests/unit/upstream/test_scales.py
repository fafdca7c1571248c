"""A run with Transformer Engine goes on from a checkpoint without its scaling states."""

from megatron.core.dist_checkpointing import ShardedObject

from megatron_let.upstream.safe_loading import without_new_scales
from tests.unit.conftest import MadeCheckpoint

SAVED = "decoder.layers.mlp.linear_fc1._extra_state"


def entry(key: str) -> ShardedObject:
    return ShardedObject(key, None, (1,), (0,))


def test_only_scaling_states_that_are_not_there_are_left_out(made: MadeCheckpoint) -> None:
    made.state[f"{SAVED}/shard_0_1"] = [None]
    made.write()
    saved, new = entry(SAVED), entry("decoder.final_layernorm._extra_state")
    other = entry("decoder.final_layernorm.weight")  # the load itself says that it is missing
    layout = {"model": {"saved": saved, "new": new, "other": other}, "states": [new, saved]}
    folder = made.save / "iter_0000007"
    expected = {"model": {"saved": saved, "other": other}, "states": [saved]}
    assert without_new_scales(layout, folder) == expected
    whole = {"model": {"saved": saved}}
    assert without_new_scales(whole, folder) is whole
