"""Run `pretrain_let.py` here and measure its steps, methods in turns; `gpu.py` starts this.

    RESULT=found.json MODES=baseline,let,salt CYCLES=5 benchmarks/run_measured.py <its flags>

With several modes the flags say `--method let+salt`: one student and one teacher, whose signals
take part in the steps of their mode alone. A step of the mode `baseline` is then one of a run
after its stop step. The first cycles warm up; in the last one the places are counted at which the
host waits for the device. A step lasts until the next one begins, log and data included.
`--train-iters` is added here.
"""

import contextlib
import functools
import json
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import alone  # noqa: E402
from megatron_let.upstream import cpu  # noqa: E402

IS_ALONE = "--fake-process-group" in sys.argv
if IS_ALONE:
    alone.fill_scattered()  # before Megatron's import too
cpu.activate_if_wanted()  # before Megatron is imported, which reads torch.compile at import

import torch  # noqa: E402

WARM_UP = 2
"""Cycles before the first measured one: kernels are compiled and chosen, memory is taken."""


class Steps:
    """What the steps of each mode took.

    Args:
        modes: a step each, in turns; whose turn it is first moves on from cycle to cycle.
        cycles: how many are measured.
    """

    def __init__(self, modes: list[str], cycles: int) -> None:
        self.modes, self.cycles = modes, cycles
        self.mode = modes[0]
        self.milliseconds: dict[str, list[float]] = {mode: [] for mode in modes}
        self.peak_bytes = dict.fromkeys(modes, 0)
        self.waits: dict[str, Counter[str]] = {mode: Counter() for mode in modes}
        self.teacher_passes: Counter[str] = Counter()
        self.trained = 0
        self._losses: dict[str, torch.Tensor] = {}
        self._number = -1
        self._began = 0.0

    @property
    def number(self) -> int:
        """Steps of the whole run."""
        return len(self.modes) * (WARM_UP + self.cycles + 1)

    @property
    def _cycle(self) -> int:
        """Of the current step, 0 for the first measured one."""
        return self._number // len(self.modes) - WARM_UP

    def begin(self) -> None:
        """End the current step, and begin the next one."""
        self.end()
        self._number += 1
        turn = self._number + self._number // len(self.modes)
        self.mode = self.modes[turn % len(self.modes)]
        torch.cuda.reset_peak_memory_stats()
        self._began = time.perf_counter()

    def end(self) -> None:
        """Wait for the device, and keep what the current step took."""
        torch.cuda.synchronize()
        passed = 1e3 * (time.perf_counter() - self._began)
        if 0 <= self._cycle < self.cycles:
            self.milliseconds[self.mode].append(passed)
            peak = max(self.peak_bytes[self.mode], torch.cuda.max_memory_allocated())
            self.peak_bytes[self.mode] = peak

    def last_loss(self) -> float | None:
        """Of the language model in the last step; None on ranks that have none."""
        return float(self._losses["lm loss"]) if "lm loss" in self._losses else None

    def around(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's `train_step`, measured."""

        @functools.wraps(train_step)
        def measured(*args: Any, **kwargs: Any) -> Any:
            self.begin()
            watched = host_waits(self.waits[self.mode]) if self._cycle == self.cycles else None
            with watched or contextlib.nullcontext():
                result = train_step(*args, **kwargs)
            self.trained += 1
            self._losses = result[0]
            return result

        return measured


@contextlib.contextmanager
def host_waits(found: Counter[str]) -> Iterator[None]:
    """Count, by place in the code, where the host waits for the device.

    torch warns of them, but for calls of `torch.cuda.synchronize`, which are counted here.
    """
    synchronize = torch.cuda.synchronize

    def counted(*args: Any, **kwargs: Any) -> None:
        found[place()] += 1
        synchronize(*args, **kwargs)

    def note(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        if "synchronizing CUDA" in str(message):
            found[place()] += 1

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=".*synchronizing CUDA")
        warnings.showwarning = note
        torch.cuda.synchronize = counted
        set_sync_debug_mode("warn")
        try:
            yield
        finally:
            set_sync_debug_mode("default")
            torch.cuda.synchronize = synchronize


def set_sync_debug_mode(mode: str) -> None:
    """Torch's, where there is a device to wait for."""
    if not cpu.is_active():
        torch.cuda.set_sync_debug_mode(mode)


def place() -> str:
    """The innermost lines outside torch and this file: who waits, and who called it."""
    lines = [
        f"{Path(frame.f_code.co_filename).name}:{line}"
        for frame, line in traceback.walk_stack(sys._getframe(1))
        if not any(part in frame.f_code.co_filename for part in ("/torch/", "warnings", __file__))
    ]
    return " < ".join(lines[:2])


# --- the program -------------------------------------------------------------------------------


def take_turns(method: Any, steps: Steps) -> None:
    """Have each of the method's signals take part in the steps of its own mode alone."""
    from megatron_let.methods.table import method_row

    def weight_at(signal: Any, weight: float, *now: int) -> float:
        return weight if isinstance(signal, tuple(method_row(steps.mode).parts())) else 0.0

    def counted(*args: Any, **named: Any) -> Any:
        steps.teacher_passes[steps.mode] += 1
        return states(*args, **named)

    states, method.host.states = method.host.states, counted
    steps.mode = method.args.method  # all take part until the first step: the teacher is loaded
    for signal in method.signals:
        weight = signal.weight_at(0)
        signal.weight_at = functools.partial(weight_at, signal, weight)
    for part in (method.host, *method.signals):
        part.release = lambda: None  # a step without the teacher is not the end of it


def main() -> None:
    """Train, and write what was found."""
    steps = Steps(os.environ["MODES"].split(","), int(os.environ["CYCLES"]))
    sys.argv += ["--train-iters", str(steps.number)]
    from megatron.training import training

    from megatron_let import pretrain as pretrain_let

    if IS_ALONE:
        alone.fill_received()
    methods: list[Any] = []
    build = pretrain_let.build_method

    def build_method(args: Any) -> Any:
        methods.append(build(args))
        if len(steps.modes) > 1:
            take_turns(methods[0], steps)
        return methods[0]

    pretrain_let.build_method = build_method
    training.train_step = steps.around(training.train_step)
    pretrain_let.main()
    steps.end()
    teacher = methods[0].describe()["teacher"] or {"parameters": 0}
    found = {
        "milliseconds": steps.milliseconds,
        "peak_bytes": steps.peak_bytes,
        "teacher_bytes": teacher["parameters"] * methods[0].args.params_dtype.itemsize,
        "waits": steps.waits,
        "teacher_passes": steps.teacher_passes,
        "trained": steps.trained,
        "loss": steps.last_loss(),
        "steps": steps.number,
    }
    Path(os.environ["RESULT"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
