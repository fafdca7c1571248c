"""`--async-save`: what Megatron's writer in the background needs to be safe, and to run on CPU."""

import copy
import functools
import multiprocessing as mp
import os
import queue
import signal
import sys
import threading
import time
from argparse import Namespace
from multiprocessing.connection import wait
from multiprocessing.managers import SyncManager
from multiprocessing.util import Finalize
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import async_utils

from megatron_let.upstream import cpu
from megatron_let.upstream.table import Redirect, apply, instead

_STRATEGIES = "megatron.core.dist_checkpointing.strategies"
_FILES = f"{_STRATEGIES}.filesystem_async"
_CALLER = f"{_STRATEGIES}.async_utils.PersistentAsyncCaller"
_write = async_utils.PersistentAsyncCaller.async_loop
CLOSE_SECONDS = 5.0  # within these a writer that was asked to end is forgotten


def redirects(args: Namespace, results: Any) -> list[Redirect]:
    """What is replaced for saves: `results` is the queue in which writers put theirs."""
    # Upstream's is in a process that imports the whole program: ten seconds on CPU.
    found = [Redirect(_FILES, "_results_queue", instead(results), "its process imports all")]
    if args.async_save:
        loop = instead(staticmethod(write_loop))
        found.append(Redirect(_CALLER, "async_loop", loop, "outlives its run, dies of its SIGTERM"))
        get = functools.partial(_watched, args)
        found.append(Redirect(_CALLER, "_get_process", get, "waits for a dead one for ever"))
    return found


def _watched(args: Namespace, start: Any) -> Any:
    forked = "fork", args.async_ckpt_cpu_priority, args.async_ckpt_io_priority

    def get(it: Any, rank: int, *others: Any, **named: Any) -> Any:
        is_new = it._persistent_process is None
        if cpu.is_active():  # for a save at the run's end, too, for which upstream spawns one
            others, named = forked, {}
        writer = start.__func__(it, rank, *others, **named)
        if is_new:
            threading.Thread(target=_end_without, args=(writer,), daemon=True).start()
        return writer

    return classmethod(get)


def prepare_saves(args: Namespace) -> None:
    """Set up where writers put their results, and the writer; before there are threads."""
    if not args.async_save:
        apply(redirects(args, queue.Queue()))
        return
    results = SyncManager(ctx=mp.get_context("fork"))
    results.start(_end_with_parent)
    apply(redirects(args, results.Queue()))
    if cpu.is_active():
        async_utils.PersistentAsyncCaller._get_process(args.rank)
    Finalize(None, _kill_writer, exitpriority=1)  # multiprocessing would wait for it


def write_loop(*args: Any) -> None:
    """Write what the run asks for, to its end and no longer; a writer's main function.

    A scheduler's signal to all processes comes before the run asks for its last save.
    """
    for end in (signal.SIGTERM, signal.SIGINT):
        signal.signal(end, signal.SIG_IGN)
    torch.set_num_threads(1)  # a fork has none of its parent's
    _end_with_parent()
    _write(*args)


def snapshot(request: Any) -> Any:
    """Return a request to save what the weights are now.

    On CPU the writer shares their memory, and would find what the next steps make of them.
    """
    if not cpu.is_active() or request.preload_fn is None:
        return request
    rank, files, results = request.async_fn_args
    files = copy.deepcopy(files)
    preload = functools.partial(request.preload_fn.func, files, True)
    return request._replace(async_fn_args=[rank, files, results], preload_fn=preload)


def _end_with_parent() -> None:
    """End this process with the run's: a next start may write the same files."""
    parent = mp.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def _end_without(writer: Any) -> None:
    """End this process if its writer does, unasked: what waits for it hears no signal."""
    wait([writer.sentinel])
    time.sleep(CLOSE_SECONDS)
    if async_utils.PersistentAsyncCaller._persistent_process is writer:
        try:
            print(
                "pretrain_let.py: error: the process that writes checkpoints (--async-save) has "
                f"ended, with status {writer.exitcode} (-9: killed, perhaps as memory was short). "
                "Start again: the run goes on from its last whole checkpoint.",
                file=sys.stderr,
                flush=True,
            )
        finally:
            os._exit(1)


def _kill_writer() -> None:
    if (writer := async_utils.PersistentAsyncCaller._persistent_process) is not None:
        async_utils.PersistentAsyncCaller._persistent_process = None
        writer.kill()
