"""Spread work over processes and take the results in order, with bounded memory."""

import mmap
import multiprocessing
import os
import pickle
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

_UNDER_WAY = 5
"""Items a worker that are submitted before the first result is taken."""
_PLACE_BYTES = 2 * 1024**2
_ALIGNMENT = 64


class _SharedMemory:
    """What large arrays are handed over in: through a pipe they take six times as long.

    It has places of one size. An array that does not fit into its place goes through the pipe.
    """

    def __init__(self, places: int) -> None:
        self._memory = memoryview(mmap.mmap(-1, places * _PLACE_BYTES))

    def pack(self, value: Any, place: int) -> tuple[bytes, list[slice | bytes]]:
        """Put the arrays of `value` into a place; return what the other process unpacks."""
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        start, end = place * _PLACE_BYTES, (place + 1) * _PLACE_BYTES
        parts: list[slice | bytes] = []
        for raw in (buffer.raw() for buffer in buffers):
            part = slice(start, start + raw.nbytes)
            if part.stop > end:
                parts.append(bytes(raw))
                continue
            self._memory[part] = raw
            parts.append(part)
            start += -(-raw.nbytes // _ALIGNMENT) * _ALIGNMENT
        return head, parts

    def unpack(self, packed: tuple[bytes, list[slice | bytes]]) -> Any:
        """The value, whose arrays lie in its place."""
        head, parts = packed
        buffers = (self._memory[p] if isinstance(p, slice) else p for p in parts)
        return pickle.loads(head, buffers=buffers)


# What a worker process computes. It is set once when the worker starts, not sent with each item.
_WORKER: dict[str, Any] = {}


def map_in_order[Item, Result](
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """Yield `function(item)` for each of `items`, in their order, computed in `workers` processes.

    Items are taken only as results are: at most five a worker are under way. The arrays of a result
    are overwritten after the next one was asked for. An exception of `function` is raised here.
    Raises ValueError if a worker process was killed.
    """
    window = _UNDER_WAY * workers
    memory = _SharedMemory(2 * window)
    # Forked workers share what the function holds instead of importing and loading it again.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (function, memory))
    # A bounded window: submitting everything at once would pull all items into memory.
    pending: deque[Future[Any]] = deque()
    try:
        for number, item in enumerate(items):
            place = 2 * (number % window)
            pending.append(pool.submit(_run_in_worker, memory.pack(item, place), place + 1))
            if len(pending) >= window:
                yield memory.unpack(pending.popleft().result())
        while pending:
            yield memory.unpack(pending.popleft().result())
    except BrokenProcessPool as error:
        raise ValueError("a worker was killed, often for memory; use fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(function: Callable[[Any], Any], memory: _SharedMemory) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a fork of a process with its threads hangs
    _WORKER.update(function=function, memory=memory)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    # Without this a killed run leaves its workers behind, waiting for work for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker process watches its parent"
    parent.join()
    os._exit(1)


def _run_in_worker(packed: Any, place: int) -> Any:
    memory = _WORKER["memory"]
    return memory.pack(_WORKER["function"](memory.unpack(packed)), place)
