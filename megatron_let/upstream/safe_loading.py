"""No byte of a checkpoint is executed: torch's reader, and Megatron's on top of it, made safe.

Two parts of a `torch_dist` checkpoint are pickles, which torch loads as the programs that they are:
`.metadata`, and the entries that are no tensors. The loaders in their place take data alone, and
tell damage from any other failure: what cannot be read when tried once more, by itself, is damaged.
"""

import io
import os
import pickle
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedObject, load_common_state_dict
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.safe_globals import SAFE_GLOBALS, _reconstruct
from megatron.training import checkpointing
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from megatron_let.errors import UsageError
from megatron_let.upstream.inert import MetadataUnpickler, why
from megatron_let.upstream.table import Redirect, apply, around, instead


class DamagedCheckpoint(UsageError):
    """Says which entry of a checkpoint cannot be read, and why; raised on all ranks at once."""


def load_bytes(self: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    """Load an entry that is no tensor: data and Megatron's few classes (`SAFE_GLOBALS`)."""
    loaded = torch.load(value, weights_only=True)
    name = read_item.dest_index.fqn
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded


@contextmanager
def agreed_damage() -> Iterator[None]:
    """Raise on all ranks, as `DamagedCheckpoint`, what the first of them to do so finds damaged.

    Entered on every rank.
    """
    found = None
    try:
        yield
    except CheckpointException as error:
        causes = (cause for cause, _ in error.failures.values())
        found = next((str(cause) for cause in causes if isinstance(cause, DamagedCheckpoint)), None)
        if found is None:
            raise
    if torch.distributed.is_initialized() and torch.distributed.get_backend() != "fake":
        all_found: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(all_found, found)
        found = next(filter(None, all_found), None)
    if found is not None:
        raise DamagedCheckpoint(found)


@around
def _naming_damage(
    read_data: Callable[..., Any], reader: FileSystemReader, plan: LoadPlan, planner: Any
) -> Any:
    try:
        return read_data(reader, plan, planner)
    except Exception as error:
        if found := _damaged_entry(reader, plan):
            raise DamagedCheckpoint(found) from error
        raise


def _damaged_entry(reader: FileSystemReader, plan: LoadPlan) -> str | None:
    """Read the entries again, up to the first that cannot be; None if the fault is not theirs."""
    for item in plan.items:
        stored = reader.storage_data[item.storage_index]
        path = reader.fs.concat_path(reader.path, stored.relative_path)
        try:
            with reader.fs.create_stream(path, "rb") as file:
                entry = io.BytesIO(reader._slice_file(file, stored).read())
            loaded = torch.load(entry, "cpu", weights_only=True)
            if isinstance(loaded, torch.Tensor):
                narrow_tensor_by_index(loaded, item.storage_offsets, item.lengths)
        except Exception as error:
            if isinstance(error, OSError | MemoryError) or "alloc" in str(error):
                return None  # the disk's fault, or this machine's
            return f"{item.storage_index.fqn} cannot be read: {why(error)}"
    return None


_READING = SimpleNamespace(load=lambda file: MetadataUnpickler(file).load(), dump=pickle.dump)
_TORCH = "torch.distributed.checkpoint"
_READER, _PLANNER = f"{_TORCH}.FileSystemReader", f"{_TORCH}.default_planner.DefaultLoadPlanner"
_SHARDS = "megatron.core.dist_checkpointing.strategies.torch.TorchDistLoadShardedStrategy"
REDIRECTS = [
    Redirect(f"{_TORCH}.filesystem", "pickle", instead(_READING), "executes a `.metadata`"),
    Redirect(_PLANNER, "load_bytes", instead(load_bytes), "executes what is no tensor"),
    Redirect(_READER, "read_data", _naming_damage, "does not tell damage from a full disk"),
    Redirect(_SHARDS, "load", agreed_damage(), "one rank's damage would leave others waiting"),
]


Loaded = tuple[Any, str, bool, Any]
"""As `_load_base_checkpoint` returns it: state, folder, whether it is a `release`, format."""
NOTHING: Loaded = (None, "", False, None)


def redirects(
    load_base: Callable[..., Loaded],
    holds: Callable[[str | None], bool],
    load: Callable[..., tuple[int, int]],
) -> list[Redirect]:
    """The ways by which a checkpoint comes in; `load` is given upstream's function first."""
    module, newest = "megatron.training.checkpointing", "loads what its tracker names"
    again = "ends where an older checkpoint would do"
    return [
        Redirect(module, "_load_base_checkpoint", instead(load_base), newest),
        Redirect(module, "checkpoint_exists", instead(holds), newest),
        Redirect("megatron.training.training", "load_checkpoint", around(load), again),
    ]


def common_state(folder: Path, step: int) -> Loaded:
    """Read what is no tensor."""
    checkpointing.set_loaded_iteration(step)
    with agreed_damage():
        state = load_common_state_dict(str(folder))
    return state, str(folder), folder.name == "release", checkpointing.CheckpointType.GLOBAL


def without_new_scales(layout: Any, folder: Path) -> Any:
    """The layout but for Transformer Engine's scaling states that a checkpoint lacks.

    Layers of Megatron's own have none, and a run with Transformer Engine goes on from theirs.
    """
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata

    def is_new(entry: Any) -> bool:
        is_scale = isinstance(entry, ShardedObject) and entry.key.endswith("_extra_state")
        return is_scale and entry.unique_key not in saved

    new, rest = extract_matching_values(layout, is_new)
    return rest if new else layout


def whole_state(folder: Path, step: int, args: Namespace, states: dict[str, Any]) -> Loaded:
    """Read all of a checkpoint into the tensors that `states` lays out."""
    checkpointing.set_loaded_iteration(step)
    # The sums were compared when it was chosen.
    args = Namespace(**vars(args) | {"verify_integrity": False})
    states.pop("gpt_compat_layer_maps")  # of another format
    layout = without_new_scales(states.pop("sharded_state_dict"), folder)
    return checkpointing._load_global_dist_base_checkpoint(
        str(folder.parent), args, False, layout, step, folder.name == "release", **states
    )


def install() -> None:
    """Have torch and Megatron read checkpoints by this module."""
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # it would execute a common.pt
    of_numpy_1 = (_reconstruct, "numpy.core.multiarray._reconstruct")  # in older random states
    torch.serialization.add_safe_globals([*SAFE_GLOBALS, of_numpy_1])
    apply(REDIRECTS)
