"""Which checkpoint a run goes on from: the newest that is whole.

Megatron takes the one that its tracker names, and writes the tracker last. What can still go wrong
is found here before anything is loaded: files cut or missing, bits that flipped (with
--verify-integrity, which writes SHA-256 sums beside the files), a tracker torn by a kill.
"""

import errno
import hashlib
import json
import os
import traceback
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.validation import save_integrity_manifest
from megatron.training import get_args
from torch.distributed.checkpoint import CheckpointException

from megatron_let.conversion.checkpoint import TRACKER, stored_bytes
from megatron_let.errors import MachineError, UsageError

SUMS = "integrity.json"
"""Megatron's `save_integrity_manifest`."""
HASHES_AT_ONCE = 8
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG)
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
    verdict: list[UsageError | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            own = _is_same(args.load, args.save)
            used = _settle(Path(args.load), args.ckpt_step, own)
            if args.verify_integrity and not (used / SUMS).is_file():
                save_integrity_manifest(str(used))  # Megatron takes none without them any more
        except (UsageError, OSError) as error:  # or the other ranks would wait for ever
            verdict = [error if isinstance(error, UsageError) else MachineError(str(error))]
    torch.distributed.broadcast_object_list(verdict)
    if verdict[0] is not None:
        raise verdict[0]


def explain_failed_save(error: BaseException) -> str | None:
    """Return one paragraph on an error of writing a checkpoint; None for any other.

    Megatron's own says "Worker failure", whatever happened.
    """
    if isinstance(error, RuntimeError) and "Worker failure" not in str(error):
        return None  # a lost peer, or no memory left
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name in ("save_checkpoint", "maybe_finalize_async_save"):
            says = next(iter(str(error).splitlines()), type(error).__name__)
            return (
                f"a checkpoint could not be written to {get_args().save}. A full disk or quota is "
                "the usual reason: make room and start again; earlier checkpoints are as they "
                f"were. Megatron says: {says}"
            )
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return f"{error.filename or 'a file'} cannot be written: {error.strerror}."
    return None


def _is_same(load: str, save: str | None) -> bool:
    return save is not None and Path(load).absolute() == Path(save).absolute()


def _settle(load: Path, step: int | None, own: bool) -> Path:
    """Return the checkpoint that will be loaded."""
    tracked = (load / TRACKER).read_text().strip()
    if step is None and tracked == "release":
        wanted = load / "release"
    elif step is None and not tracked.isdecimal():
        wanted = None  # torn: Megatron does not write it in one go
    else:
        wanted = load / _name(int(tracked) if step is None else step)
    problem = "its tracker is torn" if wanted is None else find_damage(wanted)
    if wanted is not None and problem is None:
        return wanted
    assert problem is not None
    if step is not None or not own or tracked == "release":
        raise UsageError(
            f"{wanted or load} is damaged: {problem}. Choose a whole checkpoint with --ckpt-step."
        )
    return _step_back(load, wanted, problem)


def _step_back(load: Path, damaged: Path | None, problem: str) -> Path:
    """Put damaged checkpoints aside, from the newest on, once an older one is found to be whole."""
    aside = [] if damaged is None else [(damaged, problem)]
    older = (p for p in load.glob("iter_*") if damaged is None or p.name < damaged.name)
    for newest in sorted(older, reverse=True):
        if (found := find_damage(newest)) is None:
            break
        aside.append((newest, found))
    else:
        problems = "; ".join(f"{path.name}: {found}" for path, found in aside) or problem
        raise UsageError(
            f"{load} holds no whole checkpoint ({problems}). Start a new run with another --save."
        )
    for path, found in aside:
        print(f"> {path} is damaged: {found}", flush=True)
        if path.exists():
            path.rename(_free_name(path.with_name(f"damaged_{path.name}")))
    partial = load / f"{TRACKER}.partial"
    partial.write_text(str(int(newest.name.removeprefix("iter_"))))
    os.replace(partial, load / TRACKER)
    print(f"> going on from {newest}, the newest whole checkpoint", flush=True)
    return newest


def _free_name(path: Path) -> Path:
    names = [path, *(path.with_name(f"{path.name}.{i}") for i in range(2, 100))]
    return next(name for name in names if not name.exists())


def _name(step: int) -> str:
    return f"iter_{step:07d}"


def find_damage(folder: Path) -> str | None:
    """Say what is wrong with one `torch_dist` checkpoint; None if nothing is.

    With sums every file is read and compared; without them, as Megatron saves by default, only
    their sizes can be.

    Raises:
        MachineError: a file is there and cannot be read now, which is no damage.
    """
    config = folder / "metadata.json"
    if not folder.is_dir():
        return "it is not there"
    if not config.is_file():
        return "it is half-written: metadata.json is missing"
    try:
        return _differing(folder) or _cut(folder, config)
    except OSError as error:
        raise MachineError(f"{folder} cannot be read now: {error}") from error


def is_written(folder: Path) -> bool:
    """Whether one `torch_dist` checkpoint has all its files, by their sizes."""
    config = folder / "metadata.json"
    return config.is_file() and _cut(folder, config) is None


def _differing(folder: Path) -> str | None:
    """Compare with the sums, before anything in the files is believed."""
    if not (folder / SUMS).is_file():
        return None
    try:
        sums = json.loads((folder / SUMS).read_text())["files"]
    except (ValueError, KeyError) as error:
        return f"{SUMS} is no list of sums: {error}"
    with ThreadPoolExecutor(HASHES_AT_ONCE) as pool:
        found = pool.map(lambda name: _sha256(folder / name), sums)
        differing = [name for name, sha in zip(sums, found, strict=True) if sha != sums[name]]
    return f"the SHA-256 of {', '.join(differing)} is not what it was" if differing else None


def _cut(folder: Path, config: Path) -> str | None:
    """Compare the files' sizes with what `.metadata` says of them."""
    try:
        if json.loads(config.read_text())["sharded_backend"] != "torch_dist":
            return None  # another format, which Megatron reads or refuses
        needed = stored_bytes(folder)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        return f"it cannot be read: {error}"
    for name, size in needed.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size < size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
    return None


def _sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
