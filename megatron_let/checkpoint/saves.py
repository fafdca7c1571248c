"""What is done around a save: what is not finite is refused before, files are summed behind it."""

import contextlib
import functools
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import serialization
from megatron.training import checkpointing, training

from megatron_let.checkpoint.finite import check_weights
from megatron_let.checkpoint.folder import step_name
from megatron_let.checkpoint.sums import Sums, forget_sums
from megatron_let.upstream.async_saves import snapshot


@contextlib.contextmanager
def watched_saves(args: Namespace) -> Iterator[None]:
    """Wrap Megatron's functions as long as the run lasts; called on every rank."""
    sums, folder = Sums(), None
    save, schedule = training.save_checkpoint, checkpointing.schedule_async_save
    manifest = serialization.save_integrity_manifest

    @functools.wraps(save)
    def checked(iteration: int, model: Any, optimizer: Any, *others: Any, **named: Any) -> None:
        nonlocal folder
        check_weights(iteration, model, optimizer)
        is_lasting = not named.get("non_persistent_ckpt")
        folder = Path(args.save, step_name(iteration)) if is_lasting else None
        if folder and torch.distributed.get_rank() == 0:
            forget_sums(folder)
        save(iteration, model, optimizer, *others, **named)
        if folder and not args.async_save:
            sums.start(folder)

    def summed_when_written(request: Any) -> None:
        if folder:
            request.add_finalize_fn(functools.partial(sums.start, folder))
        schedule(snapshot(request))

    training.save_checkpoint = checked
    checkpointing.schedule_async_save = summed_when_written
    serialization.save_integrity_manifest = lambda folder: None  # while all ranks wait
    try:
        yield
        sums.finish()
    except SystemExit:
        sums.finish()
        raise
    finally:
        training.save_checkpoint, checkpointing.schedule_async_save = save, schedule
        serialization.save_integrity_manifest = manifest
