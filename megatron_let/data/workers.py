"""Spread work over processes and take the results in order, with bounded memory."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

# What a worker process computes. It is set once when the worker starts, not sent with each item.
_WORKER: dict[str, Callable[[Any], Any]] = {}


def map_in_order[Item, Result](
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """Yield `function(item)` for each of `items`, in their order, computed in `workers` processes.

    Items are taken only as results are: at most five a worker are under way. An exception of
    `function` is raised here. Raises ValueError if a worker process was killed.
    """
    # Forked workers share what the function holds instead of importing and loading it again.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (function,))
    # A bounded window: submitting everything at once would pull all items into memory.
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(_run_in_worker, item))
            if len(pending) >= 5 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError("a worker was killed, often for memory; use fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(function: Callable[[Any], Any]) -> None:
    _WORKER["function"] = function
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    # Without this a killed run leaves its workers behind, waiting for work for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker process watches its parent"
    parent.join()
    os._exit(1)


def _run_in_worker(item: Any) -> Any:
    return _WORKER["function"](item)
