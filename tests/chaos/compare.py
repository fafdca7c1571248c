"""All that a checkpoint holds, as something to compare: a resumed run must end in the same."""

import hashlib
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_let.checkpoint.reader import COMMON_STATE, Checkpoint
from megatron_let.upstream.inert import Inert, load_inert
from tests.support.tiny_run import checkpoint, hashes, tensor_names

OF_THE_START = {
    "save",
    "load",
    "tensorboard_dir",
    "iteration",
    "num_floating_point_operations_so_far",
}
"""Arguments that tell of a start, not of the run's state."""


EXPECTED = (
    *("decoder.", "optimizer.state.exp_avg_sq.", "rng_state/", "rerun_state_machine_state/"),
    *("common.opt_param_scheduler.num_steps", "args.consumed_train_samples"),
)
"""Or something would be compared with nothing."""


def contents(save: Path) -> dict[str, str]:
    """Weights, moments, random states, scheduler and counters of the last checkpoint, by name."""
    saved = checkpoint(save)
    objects = saved.names - tensor_names(saved) - {COMMON_STATE}
    found = hashes(save) | {name: _of_bytes(saved, name) for name in objects}
    common = load_inert(saved._common_state())[0]
    found |= dict(_flat("common", {k: v for k, v in common.items() if k != "args"}))
    args = {k: v for k, v in vars(common["args"]).items() if k not in OF_THE_START}
    return found | dict(_flat("args", args))


def differing(save: Path, whole: Path) -> list[str]:
    """Names of what is not the same in two runs' last checkpoints."""
    ours, theirs = contents(save), contents(whole)
    for name in (
        "rng_state/",
        "optimizer.state.exp_avg_sq.",
        "common.opt_param_scheduler.num_steps",
    ):
        assert any(key.startswith(name) for key in theirs), name
    assert "args.consumed_train_samples" in theirs
    return sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))


def _of_bytes(saved: Checkpoint, name: str) -> str:
    return hashlib.sha256(saved._mapped(MetadataIndex(name))).hexdigest()


def _flat(name: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flat(f"{name}.{key}", inner)]
    if isinstance(value, Inert):
        return _flat(name, list(value.args))
    if isinstance(value, (list, tuple)):
        return [(name, str(len(value)))] + [
            pair for i, inner in enumerate(value) for pair in _flat(f"{name}.{i}", inner)
        ]
    if torch.is_tensor(value):
        return [(name, f"{value.dtype} {value.tolist()}")]
    return [(name, repr(value))]
