"""Reading checkpoints: the right one, whole, and without running anything a file names."""

import logging
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_let.checkpoint.folder import find_checkpoint
from megatron_let.checkpoint.reader import Checkpoint
from megatron_let.errors import UsageError
from tests.unit.conftest import MadeCheckpoint


class Calls:
    """Calls a function with an argument when it is unpickled."""

    def __init__(self, function: Callable[[str], object], argument: Path) -> None:
        self.call = function, (str(argument),)

    def __reduce__(self) -> tuple:
        return self.call


def test_reads_tensors_and_arguments(made: MadeCheckpoint) -> None:
    checkpoint = Checkpoint(find_checkpoint(made.save))
    assert checkpoint.names == set(made.state)
    assert vars(checkpoint.args()) == vars(made.args)
    for name in ("decoder.layers.mlp.linear_fc1.weight", "output_layer.weight"):
        assert torch.equal(checkpoint.read(name), made.state[name])


def test_reads_the_older_common_state(made: MadeCheckpoint) -> None:
    (common,) = made.state.pop("common_state/shard_0_1")
    made.write()
    folder = find_checkpoint(made.save)
    with pytest.raises(UsageError, match="does not hold the arguments"):
        Checkpoint(folder).args()
    torch.save(common, folder / "common.pt")
    assert Checkpoint(folder).args().num_layers == 2


def test_finds_the_newest_or_the_named_iteration(made: MadeCheckpoint) -> None:
    folder = find_checkpoint(made.save)
    assert folder.name == "iter_0000007" == find_checkpoint(made.save, 7).name
    with pytest.raises(UsageError, match="iter_0000008. .* holds: iter_0000007"):
        find_checkpoint(made.save, 8)
    with pytest.raises(UsageError, match="not an iter_ folder"):
        find_checkpoint(folder)
    tracker = made.save / "latest_checkpointed_iteration.txt"
    for step in (10_000_000, 9_999_999, 10_000_001):
        shutil.copytree(folder, made.save / f"iter_{step}")
    (made.save / "iter_10000001" / ".metadata").unlink()  # still being written
    (folder / ".metadata").rename(made.save / "iter_0000007.mine")
    for word in ("7", "99", "7x", None):
        tracker.unlink() if word is None else tracker.write_text(word)
        assert find_checkpoint(made.save).name == "iter_10000000"
    for path in made.save.glob("iter_*"):
        path.rename(made.save / "release") if path.name == "iter_10000000" else path.rename(
            made.save / f"old_{path.name}"
        )
    assert find_checkpoint(made.save).name == "release"


def test_refuses_another_format(made: MadeCheckpoint) -> None:
    config = made.save / "iter_0000007" / "metadata.json"
    config.write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(UsageError, match="--ckpt-format zarr; only torch_dist"):
        find_checkpoint(made.save)
    config.unlink()
    with pytest.raises(UsageError, match=r"No whole checkpoint at \S+. \S+ holds: "):
        find_checkpoint(made.save)
    (config.parent / "mp_rank_00").mkdir()
    for step in (None, 7):
        with pytest.raises(UsageError, match="--ckpt-format torch; only torch_dist"):
            find_checkpoint(made.save, step)


def test_objects_of_other_classes_are_not_built(made: MadeCheckpoint, tmp_path: Path) -> None:
    """Arguments that hold an enumeration load; a call hidden in them is not made."""
    target = tmp_path / "made"
    made.args.exit_signal = signal.SIGTERM
    made.args.other = Calls(logging.FileHandler, target)
    made.write()
    args = Checkpoint(find_checkpoint(made.save)).args()
    assert args.num_layers == 2
    assert not target.exists()
    pickle.loads(pickle.dumps(made.args.other)).close()  # twin: a plain pickle does call it
    assert target.exists()


def test_calls_of_the_system_are_refused(made: MadeCheckpoint, tmp_path: Path) -> None:
    made.args.level = Calls(os.mkdir, tmp_path / "made")
    made.write()
    with pytest.raises(UsageError, match="common_state.* not data alone"):
        Checkpoint(find_checkpoint(made.save)).args()
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", ["evil", "cut", "missing"])
def test_damaged_metadata_is_refused(made: MadeCheckpoint, tmp_path: Path, content: str) -> None:
    path = made.save / "iter_0000007" / ".metadata"
    if content == "evil":
        path.write_bytes(pickle.dumps(Calls(os.mkdir, tmp_path / "made")))
    elif content == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        path.unlink()
    with pytest.raises(UsageError, match=r"\.metadata cannot be read"):
        Checkpoint(path.parent)
    assert not (tmp_path / "made").exists()


def test_missing_data_is_refused(made: MadeCheckpoint) -> None:
    checkpoint = Checkpoint(find_checkpoint(made.save))
    (data,) = checkpoint.folder.glob("*.distcp")
    data.write_bytes(data.read_bytes()[:2000])
    with pytest.raises(UsageError, match="output_layer.weight in .* cannot be read"):
        checkpoint.read("output_layer.weight")
    data.unlink()
    with pytest.raises(UsageError, match="output_layer.weight in .* cannot be read"):
        checkpoint.read("output_layer.weight")
    with pytest.raises(UsageError, match="is not a tensor"):
        checkpoint.read("rng_state/shard_0.0_1.1")
