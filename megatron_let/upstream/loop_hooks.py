"""What may be done around the steps, evaluations and saves of Megatron's loop.

The loop has no hooks of its own, so five functions are wrapped as long as a run lasts; a test pins
their signatures. Listeners are called in the order in which they were given.
"""

import contextlib
import functools
import inspect
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.training import get_tensorboard_writer
from megatron.training.checkpointing import get_checkpoint_name
from megatron.training.utils import is_last_rank

from megatron_let.console import say
from megatron_let.upstream.async_saves import snapshot
from megatron_let.upstream.table import Redirect, applied, around, returns

_TRAINING, _NO_HOOK = "megatron.training.training", "the loop has no hook there"
_SAVING = "megatron.training.checkpointing"
_FILES = "megatron.core.dist_checkpointing.serialization"
_signature = functools.cache(inspect.signature)  # asked at every step

LISTENERS: list[Callable[[Namespace], "Listener"]] = []
"""Makers of further listeners, given the run's arguments; a --method-module may append one."""


@dataclass
class Step:
    """A training step that has just been made."""

    number: int  # as the log numbers it, from 1
    losses: dict[str, torch.Tensor]  # Megatron's, scalars; on the last pipeline stage
    grad_norm: float | None  # over all ranks; None if no update was made
    learning_rate: float | None
    is_skipped: bool  # Megatron made no update: something was not finite
    reported: dict[str, torch.Tensor] = field(default_factory=dict)
    """Scalars of listeners, equal on all ranks, that are logged beside Megatron's losses."""


@dataclass(frozen=True)
class Save:
    """A checkpoint that is about to be written."""

    step: int
    chunks: list[torch.nn.Module]
    optimizer: Any
    folder: Path | None  # None for one that does not last (`--non-persistent-save-interval`)


class Listener:
    """All events come on every rank; the defaults do nothing."""

    def on_load(self, state: dict[str, Any]) -> None:
        """A checkpoint's `state()` of this class, before the run goes on from it."""

    def on_start(self, data: str | None) -> None:
        """Model, checkpoint and data are there; `data` is the hash of the data and their order."""

    def after_step(self, step: Step) -> None:
        """A step was made and is not logged yet: what is to be logged goes to `step.reported`."""

    def after_log(self, step: Step) -> None:
        """Megatron has logged the step."""

    def after_evaluation(self, losses: dict[str, torch.Tensor]) -> None:
        """A data set was evaluated; `losses` are means, on the last pipeline stage."""

    def before_save(self, save: Save) -> None:
        """A checkpoint is about to be written: who ends the run here (`end_run`) prevents it."""

    def after_save(self, folder: Path) -> None:
        """A lasting checkpoint has all its files (with `--async-save`: some steps later)."""

    def on_end(self, is_complete: bool) -> None:
        """The run ends, by its last step or, where Megatron stops it before, by `sys.exit`."""

    def state(self) -> dict[str, Any]:
        """Numbers, texts, lists and dicts of them, to be carried by each checkpoint."""
        return {}


def _plain(value: Any) -> Any:
    """Return a value with lists for arrays; TypeError if it holds what is no data."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # of NumPy or torch
        return value.tolist()
    if value is not None and type(value) not in (bool, int, float, str):
        raise TypeError(f"it holds a {type(value).__name__}")
    return value


class LoopHooks:
    """Calls listeners from within Megatron's loop."""

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.listeners: list[Listener] = []
        self._reported: set[str] = set()  # names of what listeners reported of the last step
        self._folder: Path | None = None  # where the lasting checkpoint goes that is being written
        self._saved = 0  # the step of the newest lasting one

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Wrap Megatron's functions as long as the run lasts."""
        with applied(self.redirects()):
            try:
                yield
            except SystemExit:
                self._tell("on_end", False)
                raise
        self._tell("on_end", True)

    def redirects(self) -> list[Redirect]:
        """What is wrapped."""
        if self.args.fake_process_group:  # alone, a rank waits in vain for what others say of it
            return self.log_redirects()
        schedule, no_sums = around(self._schedule_save), returns(None)
        return [
            *self.log_redirects(),
            Redirect(_TRAINING, "save_checkpoint", around(self._save), _NO_HOOK),
            Redirect(_SAVING, "schedule_async_save", schedule, "saves what weights become later"),
            Redirect(_FILES, "save_integrity_manifest", no_sums, "rank 0 sums while others wait"),
        ]

    def log_redirects(self) -> list[Redirect]:
        """What is wrapped of steps and evaluations alone."""
        return [
            Redirect(_TRAINING, "training_log", around(self._log), _NO_HOOK),
            Redirect(_TRAINING, "evaluate", around(self._evaluate), _NO_HOOK),
        ]

    def on_start(self, data: str | None) -> None:
        """Tell that the run begins."""
        self._tell("on_start", data)

    def on_load(self, saved: Namespace) -> None:
        """Give each listener back what it had in the checkpoint with these arguments."""
        states = vars(saved).get("listener_states", {})
        for name, listener in self._named_listeners():
            if (state := states.get(name)) is not None:
                listener.on_load(state)

    def _named_listeners(self) -> Iterator[tuple[str, Listener]]:
        """By their class, and from the second one of a class on with its number."""
        seen: Counter[str] = Counter()
        for listener in self.listeners:
            name = type(listener).__name__
            seen[name] += 1
            yield name if seen[name] == 1 else f"{name} {seen[name]}", listener

    def _states(self) -> dict[str, Any]:
        """What the listeners keep, made plain: no checkpoint with anything else would load."""
        states = {}
        for name, listener in self._named_listeners():
            try:
                states[name] = _plain(listener.state())
            except TypeError as error:
                if torch.distributed.get_rank() == 0:
                    say(f"> the state of {name} is no plain data and is not saved: {error}")
        return {name: state for name, state in states.items() if state}

    def _tell(self, event: str, *values: Any) -> None:
        for listener in self.listeners:
            getattr(listener, event)(*values)

    def _log(self, training_log: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = _signature(training_log).bind(*args, **kwargs).arguments
        step = Step(
            number=given["iteration"],
            losses=given["loss_dict"],
            grad_norm=given["grad_norm"],
            learning_rate=given["learning_rate"],
            is_skipped=bool(given["skipped_iter"]),
        )
        if step.number >= self.args.train_iters:  # this end is the run's own, and is evaluated
            self.args.exit_interval = self.args.exit_duration_in_mins = None
        self._tell("after_step", step)
        if is_last_rank():
            self._log_reported(step, given["total_loss_dict"])
        result = training_log(*args, **kwargs)
        self._tell("after_log", step)
        return result

    def _log_reported(self, step: Step, totals: dict[str, Any]) -> None:
        """Hand Megatron what it reads now; in between add it up here: its sum waits for the GPU."""
        for name in self._reported - step.reported.keys():
            totals.pop(name, None)  # else 0.0 for the rest of the run
        self._reported = set(step.reported)
        writer, drawn = get_tensorboard_writer(), self.args.tensorboard_log_interval
        is_logged = step.number % self.args.log_interval == 0
        if is_logged or (writer and step.number % drawn == 0):
            # Megatron divides by all steps of an interval: what comes at its end alone stays out.
            is_late = is_logged and totals.get("advanced iterations", 0) > 0
            known = totals if is_late else step.reported
            step.losses.update((n, v) for n, v in step.reported.items() if n in known)
        elif not step.is_skipped:
            for name, value in step.reported.items():
                totals[name] = totals.get(name, 0) + value

    def _evaluate(self, evaluate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = evaluate(*args, **kwargs)
        self._tell("after_evaluation", result[0] or {})
        return result

    def _save(self, save_checkpoint: Callable[..., None], *given: Any, **named: Any) -> None:
        step, chunks, optimizer = given[:3]
        is_lasting, args = not named.get("non_persistent_ckpt"), self.args
        if args.save is None:
            return  # Megatron saves after a bad step, too, whatever the flags say
        folder = Path(get_checkpoint_name(args.save, step, return_base_dir=True))
        # A complete run, started again; or no step was begun since, as where batches grow.
        is_end = step == args.iteration >= args.train_iters
        is_there = is_end and (folder / "metadata.json").exists()
        if is_lasting and (is_there or step == self._saved > args.curr_iteration):
            return  # a kill would leave half of a checkpoint that was whole
        self._folder = folder if is_lasting else None
        self._tell("before_save", Save(step, chunks, optimizer, self._folder))
        self.args.listener_states = self._states()
        save_checkpoint(*given, **named)
        self._saved = step if is_lasting else self._saved
        if self._folder and not self.args.async_save:
            self._tell("after_save", self._folder)

    def _schedule_save(self, schedule: Callable[[Any], None], request: Any) -> None:
        if self._folder:
            request.add_finalize_fn(functools.partial(self._tell, "after_save", self._folder))
        schedule(snapshot(request))
