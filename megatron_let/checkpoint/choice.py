"""Which checkpoint a run goes on from: the newest that is whole.

The folders decide. Megatron's tracker is written last and not in one go: it can be torn by a kill,
lost, or edited. Damage is what sizes, sums (`sums.py`) or the load (`safe_loading.py`) tell.
"""

import errno
import os
import traceback
from argparse import Namespace
from pathlib import Path

from megatron.training import get_args
from torch.distributed.checkpoint import CheckpointException

from megatron_let.checkpoint.folder import (
    TRACKER,
    cut,
    is_finished,
    is_written,
    iteration_folders,
    listed,
    step_of,
)
from megatron_let.checkpoint.reader import Checkpoint
from megatron_let.console import say
from megatron_let.errors import MachineError, UsageError, first_line
from megatron_let.files import write_whole

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG)
SAVE_ERRORS = (RuntimeError, OSError, CheckpointException)
"""What a failed save raises; the last is no `Exception`."""
RELEASE = -1
"""Stands for the iteration of a `release`: weights without one."""


def check_flags(args: Namespace) -> None:
    """Refuse what saves or loads in another way than this program's."""
    used = any((args.save, args.load, args.pretrained_checkpoint))
    for flag, value, good in (
        ("--ckpt-format", args.ckpt_format if used else None, "torch_dist"),
        ("--ckpt-convert-format", args.ckpt_convert_format, None),
        ("--non-persistent-ckpt-type", args.non_persistent_ckpt_type, "global"),
    ):
        if value not in (None, good):
            raise UsageError(
                f"{flag} {value} is refused: only folders in torch_dist format are read here, of "
                "which nothing is executed; what is saved otherwise could never be loaded. Leave "
                "it out. Megatron-LM's pretrain_gpt.py converts older checkpoints that you trust."
            )


def choose(args: Namespace, load: str, damaged: dict[Path, str]) -> Path | None:
    """Return the checkpoint in `load` that a run goes on from; None if it starts from scratch.

    To `damaged`, checkpoints with what is wrong, is added what is found. One that was asked for by
    name, or is another run's, must be whole: else a `UsageError`, as where there is none.
    """
    folder, problems = Path(load), []
    for step, path in _candidates(args, folder):
        if not is_finished(path) and args.ckpt_step is None and step > (read_tracker(folder) or 0):
            continue  # a save that was killed
        if (problem := damaged.get(path) or find_damage(path)) is None:
            return path
        damaged[path] = problem
        problems.append(f"{path.name}: {problem}")
        if args.ckpt_step is not None or not is_own(args, folder):
            raise UsageError(
                f"{path} is damaged: {problem}. Choose a whole checkpoint with --ckpt-step; "
                f"{folder} holds: {listed(folder)}."
            )
    if problems:
        raise UsageError(
            f"{folder} holds no whole checkpoint ({'; '.join(problems)}). Start a new run with "
            "another --save."
        )
    may_start = is_own(args, folder) and not args.exit_on_missing_checkpoint
    if may_start or (load == args.load and args.pretrained_checkpoint is not None):
        return None
    raise UsageError(
        f"No checkpoint in {folder}: give the folder that was a run's --save, not an iter_ folder "
        "inside it. Only with --save of the same name does a run start without one."
    )


def _candidates(args: Namespace, load: Path) -> list[tuple[int, Path]]:
    folders = iteration_folders(load)
    tracked, found = read_tracker(load), list(folders.items())
    is_load = args.load is not None and load == Path(args.load)
    if args.non_persistent_ckpt_type == "global" and is_load:
        extra = args.non_persistent_global_ckpt_dir or load / "non_persistent"
        found += iteration_folders(Path(extra)).items()
    wanted = args.ckpt_step
    if wanted is None and not is_own(args, load) and tracked not in (None, RELEASE, *folders):
        wanted = tracked  # another run's newest is gone: it is not for us to take an older one
    if wanted is None:
        found += [(RELEASE, load / "release")] * (load / "release").is_dir()
    elif (found or args.pretrained_checkpoint is None) and wanted not in dict(found):
        raise UsageError(
            f"There is no checkpoint of step {wanted} in {load}, which holds: {listed(load)}. "
            "Choose one of them with --ckpt-step."
        )
    found = [(step, path) for step, path in found if wanted in (None, step)]
    return sorted(found, key=lambda pair: pair[0])[::-1]


def read_tracker(load: Path) -> int | None:
    """Return the iteration that the tracker names, or `RELEASE`; None if it is gone or torn."""
    try:
        word = (load / TRACKER).read_text().strip()
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return None
    if word == "release":
        return RELEASE
    return int(word) if word.isdecimal() else None


def is_own(args: Namespace, load: Path) -> bool:
    """Whether a folder to load from is the one that this run saves to."""
    return args.save is not None and os.path.realpath(load) == os.path.realpath(args.save)


def refuse_overwriting(args: Namespace, start: int, damaged: dict[Path, str]) -> None:
    """Refuse a run from a step before whole checkpoints in its `--save`."""
    if args.save is None or args.skip_train:
        return
    known = set(map(os.path.realpath, damaged))
    later = [p for step, p in iteration_folders(Path(args.save)).items() if step > start]
    if whole := [p.name for p in later if os.path.realpath(p) not in known and is_written(p)]:
        raise UsageError(
            f"This run starts from step {start} and would overwrite {', '.join(whole)} in --save "
            f"{args.save}. To go on from the newest, add --load {args.save} and leave out "
            "--ckpt-step and --finetune; or choose another --save."
        )


def mend(args: Namespace, used: Path, damaged: dict[Path, str]) -> None:
    """Once a whole checkpoint is loaded: say what was wrong, and mend what is this run's own."""
    load = used.parent
    step = RELEASE if used.name == "release" else step_of(used)
    is_tracked = read_tracker(load) == step or load != Path(args.load or "")
    if args.ckpt_step is not None or (is_tracked and not damaged):
        return
    if not is_tracked:
        say(f"> {load / TRACKER} does not name the newest whole checkpoint")
    for path, problem in damaged.items():
        say(f"> {path} is damaged: {problem}")
    say(f"> going on from {used}, the newest whole checkpoint")
    if not is_own(args, Path(args.load)):
        return
    try:
        for path in filter(Path.exists, damaged):  # to be neither loaded nor overwritten
            path.rename(_free_name(path.with_name(f"damaged_{path.name}")))
        if not is_tracked and step != RELEASE:
            write_whole(load / TRACKER, str(step))
    except OSError as error:
        say(f"> {args.load} is left as it is: {error}")


def _free_name(path: Path) -> Path:
    names = [path, *(path.with_name(f"{path.name}.{i}") for i in range(2, 100))]
    return next(name for name in names if not name.exists())


def find_damage(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint's sizes, or what a run reads first; None if nothing is.

    A file that is there and cannot be read now is a `MachineError`, no damage.
    """
    if not is_finished(folder):
        return "it is half-written: metadata.json is missing or damaged"
    try:
        return cut(folder) or Checkpoint(folder).unreadable_state()
    except OSError as error:
        raise MachineError(f"{folder} cannot be read now: {error}") from error


def explain_failed_save(error: BaseException) -> str | None:
    """Return one paragraph on an error of writing a checkpoint; None for any other."""
    if isinstance(error, RuntimeError) and "Worker failure" not in str(error):
        return None  # a lost peer, or no memory left
    called = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
    if called & {"save_checkpoint", "maybe_finalize_async_save"}:
        return (
            f"a checkpoint could not be written to {get_args().save}. A full disk or quota is the "
            "usual reason: make room and start again; earlier checkpoints are as they were. "
            f"Megatron says: {first_line(error)}"
        )
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return f"{error.filename or 'a file'} cannot be written, or read: {error.strerror}."
    return None
