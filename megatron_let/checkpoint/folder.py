"""A folder of checkpoints: their names, whether all their bytes are there, and what they were."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata

from megatron_let.errors import MachineError, UsageError
from megatron_let.files import sha256
from megatron_let.upstream.inert import MetadataUnpickler

TRACKER = "latest_checkpointed_iteration.txt"
SUMS = "integrity.json"
"""SHA-256 of the files, by Megatron's name and in its format."""


def step_of(checkpoint: Path) -> int:
    """Return the iteration that a run which goes on from a checkpoint has behind it."""
    return 0 if checkpoint.name == "release" else int(checkpoint.name.removeprefix("iter_"))


def iteration_folders(load: Path) -> dict[int, Path]:
    """Return the checkpoints' folders in `load` by iteration, the newest last."""
    # Only a name that Megatron gives counts: `iter_0000005.mine` is its owner's.
    names = (path.name.removeprefix("iter_") for path in load.glob("iter_*"))
    steps = sorted({int(name) for name in names if name.isdecimal()})
    folders = {step: load / f"iter_{step:07d}" for step in steps}
    return {step: folder for step, folder in folders.items() if folder.is_dir()}


def listed(load: Path) -> str:
    """Say which checkpoints a folder holds."""
    return ", ".join(path.name for path in iteration_folders(load).values()) or "none"


def is_finished(folder: Path) -> bool:
    """Whether a save came to its end, which is to write `metadata.json`.

    Another format than `torch_dist`, which might execute what it holds, is a `UsageError`.
    """
    try:
        saved = json.loads((folder / "metadata.json").read_text())["sharded_backend"]
    except (FileNotFoundError, NotADirectoryError):
        saved = "torch" if any(folder.glob("mp_rank_*")) else None
    except (ValueError, KeyError, TypeError):
        saved = None
    if saved not in (None, "torch_dist"):
        raise UsageError(
            f"{folder} was saved with --ckpt-format {saved}; only torch_dist can be read. "
            "Megatron-LM's pretrain_gpt.py converts what you trust: --ckpt-convert-format."
        )
    return saved is not None


def find_checkpoint(load: Path, step: int | None = None) -> Path:
    """Return the checkpoint of iteration `step` below `load`, or the newest with all its bytes."""
    folders = [*iteration_folders(load).values()][::-1] + [load / "release"]
    if step is not None:
        folders = [load / f"iter_{step:07d}"]
    problem: str | None = None
    for folder in folders:
        if is_finished(folder) and (problem := cut(folder)) is None:
            return folder
    found = f" ({problem})" if problem else ""
    raise UsageError(
        f"No whole checkpoint at {load if step is None else folders[0]}{found}. {load} holds: "
        f"{listed(load)}. Give the folder that was the run's --save, not an iter_ folder inside "
        "it; --ckpt-step chooses among those."
    )


def is_written(folder: Path) -> bool:
    """Whether one `torch_dist` checkpoint has all its files, by their sizes."""
    return (folder / "metadata.json").is_file() and cut(folder) is None


def cut(folder: Path) -> str | None:
    """Compare the files' sizes with what `.metadata` says of them; say what is wrong."""
    needed: dict[str, int] = {}
    try:
        for stored in read_metadata(folder).storage_data.values():
            name, end = stored.relative_path, stored.offset + stored.length
            needed[name] = max(end, needed.get(name, 0))
    except UsageError as error:
        return str(error)
    for name, size in needed.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size < size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
    return None


def differing(folder: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """Say which of this rank's share of the files are not what their sums are of, if any.

    A file that is there and cannot be read now is a `MachineError`, no damage.
    """
    if not (folder / SUMS).is_file():
        return None
    try:
        every = json.loads((folder / SUMS).read_text())["files"]
        expected = {folder / name: every[name] for name in sorted(every)[rank::ranks]}
    except (ValueError, KeyError, TypeError) as error:
        return f"{SUMS} is no list of sums: {error}"
    present = [path for path in expected if path.is_file()]
    try:
        with ThreadPoolExecutor(8) as pool:
            found = dict(zip(present, pool.map(sha256, present), strict=True))
    except OSError as error:
        raise MachineError(f"{folder} cannot be read now: {error}") from error
    others = [path.name for path in expected if found.get(path) != expected[path]]
    return f"the SHA-256 of {', '.join(others)} is not what it was" if others else None


def read_metadata(folder: Path) -> Metadata:
    """Return what `.metadata` says of the other files; one that is damaged is a `UsageError`."""
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = MetadataUnpickler(file).load()
        for stored in metadata.storage_data.values():
            name = stored.relative_path
            if Path(name).name != name or min(stored.offset, stored.length) < 0:
                raise ValueError(f"it names no place in a file here: {name}")
    except Exception as error:  # a damaged pickle can raise anything
        if isinstance(error, OSError) and path.exists():
            raise  # the disk's fault
        raise UsageError(f"{path} cannot be read: {error}") from error
    return metadata
