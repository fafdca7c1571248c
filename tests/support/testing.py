"""Test helpers: pools of real gloo processes, whole programs, tiny models of real architectures.

Importing Megatron and starting a process group is the dear part of a distributed test. So a server
imports Megatron once (`PRELOADED`), its forks run programs or form pools, and a pool, one for each
world size, runs many cases.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import multiprocessing as mp
import os
import queue
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

START_SECONDS = 120
CASE_SECONDS = 180
PRELOADED = "tests.preloaded"
"""What the server imports; a fork imports it if the server, started elsewhere, did not find it."""


@functools.cache
def _fork_server() -> Any:
    """Start processes as forks of one that has imported Megatron: 0.1 s instead of 7."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    return context


class WorkerPool:
    """`world_size` processes with a gloo process group, which run functions given to them.

    Args:
        world_size: number of processes, ranks 0 to `world_size - 1`.
    """

    def __init__(self, world_size: int) -> None:
        context = _fork_server()
        self.world_size = world_size
        self._results: Any = context.Queue()
        self._tasks = [context.Queue() for _ in range(world_size)]
        port = _free_port()
        self._processes = [
            context.Process(
                target=_worker,
                args=(rank, world_size, port, self._tasks[rank], self._results),
            )
            for rank in range(world_size)
        ]
        for process in self._processes:
            process.start()
        # Not daemons, which may have no children: saving a checkpoint starts a process.
        atexit.register(self.close)

    def run(self, function: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Run `function(*args, **kwargs)` on every rank; return the results in rank order.

        The function is named, "package.module:function", so that the caller need not import
        Megatron; arguments and results are pickled, so use numpy arrays.

        Raises:
            RuntimeError: with the traceback of the first rank that failed. The pool is closed
                then, since the other ranks may wait for the failed one for ever.
        """
        for tasks in self._tasks:
            tasks.put((function, args, kwargs))
        results: dict[int, Any] = {}
        while len(results) < self.world_size:
            rank, ok, value = self._next_result(set(range(self.world_size)) - results.keys())
            if not ok:
                self.close()
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            results[rank] = value
        return [results[rank] for rank in range(self.world_size)]

    def _next_result(self, missing: set[int]) -> tuple[int, bool, Any]:
        for _ in range(START_SECONDS + CASE_SECONDS):
            was_open = self.is_open
            with contextlib.suppress(queue.Empty):
                return self._results.get(timeout=1)
            if not was_open:
                break
        what = "hang" if self.is_open else "have ended without an answer"
        self.close()
        raise RuntimeError(f"ranks {missing} {what}")

    @property
    def is_open(self) -> bool:
        """Whether all processes live."""
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        """End all processes, and those that they have started."""
        atexit.unregister(self.close)
        for process in self._processes:
            assert process.pid is not None
            with contextlib.suppress(ProcessLookupError):  # it has not made its group yet
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()


@functools.cache
def _pools() -> dict[int, WorkerPool]:
    return {}


def run_distributed(function: str, world_size: int, *args: Any, **kwargs: Any) -> list[Any]:
    """Run a function on `world_size` gloo ranks; return the list of results in rank order.

    The pool of each world size lives until the interpreter ends; a failed one is replaced.
    """
    pools = _pools()
    if world_size not in pools or not pools[world_size].is_open:
        pools[world_size] = WorkerPool(world_size)
    return pools[world_size].run(function, *args, **kwargs)


def run_program(
    program: str,
    *argv: str,
    launcher: dict[str, str] | None = None,
    timeout: float = CASE_SECONDS,
) -> subprocess.CompletedProcess[str]:
    """Run a Python file as `python PROGRAM ARGV` would on CPU, but for the imports it need not do.

    Args:
        program: path of the file, or the name of a module.
        argv: its command line.
        launcher: what torchrun would put into its environment.
        timeout: seconds after which it is killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder, "out"), Path(folder, "err")
        process = _fork_server().Process(
            target=_program, args=(program, argv, launcher or {}, *outputs)
        )
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired([program, *argv], timeout)
        out, err = (path.read_text() for path in outputs)
    return subprocess.CompletedProcess([program, *argv], process.exitcode, out, err)


def _program(
    program: str, argv: tuple[str, ...], launcher: dict[str, str], out: Path, err: Path
) -> None:
    for path, stream in ((out, 1), (err, 2)):
        with path.open("w") as file:
            os.dup2(file.fileno(), stream)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ |= launcher
    importlib.import_module(PRELOADED)
    sys.argv = [program, *argv]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end_with_parent() -> None:
    """End this worker and what it started when the test process is gone, however it went."""
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _worker(rank: int, world_size: int, port: int, tasks: Any, results: Any) -> None:
    os.setpgrp()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    sys.stdout = open(os.devnull, "w")  # Megatron prints its 900 arguments at every start
    importlib.import_module(PRELOADED)
    import torch

    torch.distributed.init_process_group("gloo")
    while True:
        function, args, kwargs = tasks.get()
        module, name = function.split(":")
        try:
            result = getattr(importlib.import_module(module), name)(*args, **kwargs)
            results.put((rank, True, result))
        except BaseException:
            results.put((rank, False, traceback.format_exc()))


def forget_outsiders() -> None:
    """Forget what a --method-module of the last run added to our tables."""
    outside = [name for name in sys.modules if name.startswith("your_")]
    if not outside:
        return
    from megatron_let.losses.table import LOSSES
    from megatron_let.methods.table import METHODS
    from megatron_let.upstream.loop_hooks import LISTENERS

    for name in outside:
        del sys.modules[name]
    LISTENERS.clear()
    for name in [name for name, row in METHODS.items() if isinstance(row.method, type)]:
        del METHODS[name]
    for name in [n for n, loss in LOSSES.items() if loss.__module__ in outside]:
        del LOSSES[name]


def forget_last_run() -> None:
    """Destroy what Megatron left in this worker: global state, models, process groups.

    Upstream drops its groups without destroying them, and each gloo group keeps threads alive:
    after some fifty runs a worker would have over a thousand, which hold up the machine.
    """
    forget_outsiders()
    import torch
    from megatron.core.dist_checkpointing.strategies import cached_metadata_filesystem_reader
    from megatron.training import training
    from torch.distributed import distributed_c10d

    training.destroy_global_state()
    # With --ckpt-assume-constant-structure saves change what is known of the loaded checkpoint.
    cached_metadata_filesystem_reader.CachedMetadataFileSystemReader.clear_metadata_cache()
    for group in list(distributed_c10d._world.pg_map):
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)
    gc.collect()  # models that refer to groups


# ----------------------------------------------------------------------------------------------
# Tiny teachers
# ----------------------------------------------------------------------------------------------

ARCHITECTURES = ("llama", "opt", "gpt_neox", "gpt2", "qwen2")


def save_tiny_teacher(
    folder: Path,
    architecture: str = "llama",
    *,
    vocab_size: int = 256,
    width: int = 48,
    seed: int = 0,
    context: int = 128,
) -> Path:
    """Save a randomly initialised two-layer causal language model; return its folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": context,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if architecture == "opt":
        shape |= {"ffn_dim": 2 * width, "word_embed_proj_dim": width}
    elif architecture == "gpt2":
        shape |= {"n_inner": 2 * width}
    else:
        shape |= {"intermediate_size": 2 * width}
    if architecture in ("llama", "qwen2"):
        shape |= {"num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(architecture, **shape)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def our_flags() -> dict[str, Any]:
    """Our flags and their defaults, from the real parser; run in a worker."""
    from argparse import ArgumentParser

    from megatron_let.training.arguments import add_arguments

    parser = add_arguments(ArgumentParser())
    ours = [g for g in parser._action_groups if (g.title or "").startswith("megatron_let: ")]
    actions = [action for group in ours for action in group._group_actions]
    return {action.option_strings[0]: action.default for action in actions}
