"""Which checkpoint a run goes on from: the newest that is whole.

Megatron takes the one that its tracker names, and writes the tracker last. What can still go wrong
is found here before anything is loaded: files cut or missing, bits that flipped (with
--verify-integrity, which writes SHA-256 sums beside the files), a tracker torn by a kill.
"""

import hashlib
import json
import os
import shutil
import traceback
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from megatron.training import get_args
from torch.distributed.checkpoint import CheckpointException

from megatron_let.conversion.checkpoint import TRACKER, stored_bytes
from megatron_let.errors import UsageError

SUMS = "integrity.json"
"""Megatron's `save_integrity_manifest`."""
HASHES_AT_ONCE = 8
SAVE_ERRORS = (RuntimeError, OSError, CheckpointException)
"""What a failed save raises; the last is no `Exception`."""


def go_on_from_a_whole_checkpoint(args: Namespace) -> None:
    """Have `--load` name a whole checkpoint; called on every rank when the groups are there.

    A damaged one of this run's own (`--load` is `--save`) is renamed, so that it is neither loaded
    nor overwritten, and the newest whole one before it takes its place in the tracker.

    Raises:
        UsageError: a checkpoint asked for by name, or of another run, is damaged; or none is whole.
    """
    if args.load is None or not (Path(args.load) / TRACKER).is_file():
        return
    verdict: list[str | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            _settle(Path(args.load), args.ckpt_step, own=_is_same(args.load, args.save))
        except UsageError as error:
            verdict = [str(error)]
    torch.distributed.broadcast_object_list(verdict)
    if verdict[0] is not None:
        raise UsageError(verdict[0])


def explain_failed_save(error: BaseException) -> str | None:
    """Return one paragraph on an error that came from saving a checkpoint; None for any other.

    Megatron's own says "Worker failure", whatever happened.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "save_checkpoint":
            save, step = get_args().save, frame.f_locals.get("iteration")
            free = shutil.disk_usage(save).free / 2**30
            return (
                f"the checkpoint of step {step} could not be written to {save}, where {free:.1f} "
                "GiB are free (a quota may leave less). Earlier checkpoints are as they were: make "
                f"room and start again. Megatron says: {str(error).splitlines()[0]}"
            )
    return None


def _is_same(load: str, save: str | None) -> bool:
    return save is not None and Path(load).absolute() == Path(save).absolute()


def _settle(load: Path, step: int | None, own: bool) -> None:
    tracked = (load / TRACKER).read_text().strip()
    if step is None and tracked == "release":
        wanted = load / "release"
    elif step is None and not tracked.isdecimal():
        wanted = None  # torn: Megatron does not write it in one go
    else:
        wanted = load / _name(int(tracked) if step is None else step)
    problem = "its tracker is torn" if wanted is None else find_damage(wanted)
    if problem is None:
        return
    if step is not None or not own or tracked == "release":
        raise UsageError(
            f"{wanted or load} is damaged: {problem}. Choose a whole checkpoint with --ckpt-step."
        )
    _step_back(load, wanted, problem)


def _step_back(load: Path, damaged: Path | None, problem: str) -> None:
    """Put damaged checkpoints aside, from the newest to the first whole one."""
    while True:
        if damaged is not None:
            print(f"> {damaged} is damaged: {problem}", flush=True)
            if damaged.exists():
                damaged.rename(_free_name(damaged.with_name(f"damaged_{damaged.name}")))
        older = [p for p in load.glob("iter_*") if damaged is None or p.name < damaged.name]
        if not older:
            raise UsageError(
                f"{load} holds no whole checkpoint; the last one looked at: {problem}. Damaged "
                "ones are there as damaged_iter_*. Start a new run with another --save."
            )
        newest = max(older)
        found = find_damage(newest)
        if found is None:
            break
        damaged, problem = newest, found
    step = str(int(newest.name.removeprefix("iter_")))
    partial = load / f"{TRACKER}.partial"
    partial.write_text(step)
    os.replace(partial, load / TRACKER)
    print(f"> going on from {newest}, the newest whole checkpoint", flush=True)


def _free_name(path: Path) -> Path:
    names = [path, *(path.with_name(f"{path.name}.{i}") for i in range(2, 100))]
    return next(name for name in names if not name.exists())


def _name(step: int) -> str:
    return f"iter_{step:07d}"


def find_damage(folder: Path) -> str | None:
    """Say what is wrong with one `torch_dist` checkpoint; None if nothing is.

    With sums every file is read and compared; without them, as Megatron saves by default, only
    their sizes can be.
    """
    if not folder.is_dir():
        return "it is not there"
    config = folder / "metadata.json"
    if not config.is_file():
        return "it is half-written: metadata.json is missing"
    try:
        if json.loads(config.read_text())["sharded_backend"] != "torch_dist":
            return None  # another format, which Megatron reads or refuses
        sums = json.loads((folder / SUMS).read_text())["files"] if (folder / SUMS).exists() else {}
        needed = stored_bytes(folder)
    except (OSError, ValueError, KeyError) as error:
        return f"it cannot be read: {error}"
    for name, size in needed.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size < size:
            return f"{name} has {(folder / name).stat().st_size} of {size} bytes"
    with ThreadPoolExecutor(HASHES_AT_ONCE) as pool:
        found = pool.map(lambda name: _sha256(folder / name), sums)
        differing = [name for name, sha in zip(sums, found, strict=True) if sha != sums[name]]
    return f"the SHA-256 of {', '.join(differing)} is not what it was" if differing else None


def _sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
