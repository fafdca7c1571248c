"""How Megatron loads a checkpoint: the functions that the door stands in, and what lies behind."""

import functools
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.training import checkpointing

from megatron_let.upstream.safe_loading import agreed_damage
from megatron_let.upstream.table import Redirect, instead

Loaded = tuple[Any, str, bool, Any]
"""As `_load_base_checkpoint` returns it: state, folder, whether it is a `release`, format."""
NOTHING: Loaded = (None, "", False, None)


def redirects(
    load_base: Callable[..., Loaded],
    holds: Callable[[str | None], bool],
    load: Callable[..., tuple[int, int]],
) -> list[Redirect]:
    """The ways by which a checkpoint comes in; `load` is given upstream's function first."""
    checkpointing_, reason = "megatron.training.checkpointing", "loads what its tracker names"
    return [
        Redirect(checkpointing_, "_load_base_checkpoint", instead(load_base), reason),
        Redirect(checkpointing_, "checkpoint_exists", instead(holds), reason),
        Redirect(
            "megatron.training.training",
            "load_checkpoint",
            lambda upstreams: functools.partial(load, upstreams),
            "ends where an older checkpoint would do",
        ),
    ]


def common_state(folder: Path, step: int) -> Loaded:
    """Read what is no tensor."""
    checkpointing.set_loaded_iteration(step)
    with agreed_damage():
        state = load_common_state_dict(str(folder))
    return state, str(folder), folder.name == "release", checkpointing.CheckpointType.GLOBAL


def whole_state(folder: Path, step: int, args: Namespace, states: dict[str, Any]) -> Loaded:
    """Read all of a checkpoint into the tensors that `states` lays out."""
    checkpointing.set_loaded_iteration(step)
    # The sums were compared when it was chosen.
    args = Namespace(**vars(args) | {"verify_integrity": False})
    states.pop("gpt_compat_layer_maps")  # of another format
    layout = states.pop("sharded_state_dict")
    return checkpointing._load_global_dist_base_checkpoint(
        str(folder.parent), args, False, layout, step, folder.name == "release", **states
    )
