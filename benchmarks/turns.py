"""Two training programs take turns, a step each: what a busy machine does, it does to both.

A token goes to and fro through two named pipes; whoever holds it trains. A turn lasts from one
step's beginning to the next one's, so it has all that Megatron's loop and the program do in
between.
"""

import atexit
import functools
import json
import os
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.training import training

PLACE = "TURNS_FOLDER"
"""Environment variable: a folder with the pipes `0` and `1`; where each side writes its times."""
SIDE = "TURNS_SIDE"
"""Environment variable: `0` begins, `1` waits."""


class Turns:
    """One side's part; its processes come and go together, the first holds the token."""

    def __init__(self, folder: Path, side: int) -> None:
        self._times = folder / f"{side}.json"
        # Open for both directions: neither end waits for the other one to be opened.
        self._own = (folder / str(side)).open("r+b", buffering=0)
        self._other = (folder / str(1 - side)).open("r+b", buffering=0)
        self._is_first = side == 0
        self._began: float | None = None
        self._seconds: list[float] = []

    def next_turn(self) -> None:
        """End this turn and wait for the next one."""
        dist.barrier()
        if dist.get_rank() == 0:
            if self._began is not None:
                self._seconds.append(time.perf_counter() - self._began)
                self._other.write(b"-")
            if self._began is not None or not self._is_first:
                self._own.read(1)
        dist.barrier()
        self._began = time.perf_counter()

    def leave(self) -> None:
        """Let the other side go on, and keep the times."""
        if self._began is not None and self._seconds:  # rank 0
            self._other.write(b"-")
            self._times.write_text(json.dumps(self._seconds))


def install_if_wanted() -> None:
    """Have this process's Megatron take turns, if the environment says so."""
    if PLACE not in os.environ:
        return
    turns = Turns(Path(os.environ[PLACE]), int(os.environ[SIDE]))
    atexit.register(turns.leave)
    plain = training.train_step

    @functools.wraps(plain)
    def train_step(*args: Any, **kwargs: Any) -> Any:
        turns.next_turn()
        return plain(*args, **kwargs)

    training.train_step = train_step
