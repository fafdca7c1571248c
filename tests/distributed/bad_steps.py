"""Run in a worker: training with something that is not finite in one step on one rank."""

import contextlib
import functools
import io
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from megatron.training import get_args, training

from megatron_let import pretrain as pretrain_let
from megatron_let.checkpoint.finite import FiniteCheck
from megatron_let.teacher.host import TeacherHost
from megatron_let.training.run import Run
from tests.support.testing import forget_last_run

End = tuple[str | int | None, str]


def train(
    argv: list[str], what: str, step: int, rank: int, value: float, checked: bool = True
) -> End:
    """Run `pretrain_let.py`; return how it ended, and what it printed.

    Args:
        argv: its flags.
        what: of `POISONS`.
        step: as the log numbers it.
        rank: where.
        value: NaN or infinity.
        checked: whether our own checks are there.
    """
    forget_last_run()
    printed, end = io.StringIO(), None
    off = ("after_step", "before_save") * (not checked)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", ["pretrain_let.py", *argv]))
        for name in off:
            stack.enter_context(mock.patch.object(FiniteCheck, name, lambda *args: None))
        stack.enter_context(POISONS[what](step, rank, value))
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(contextlib.redirect_stderr(printed))
        try:
            pretrain_let.main()
        except SystemExit as error:
            end = error.code
        except RuntimeError as error:
            end = str(error)
    return end, printed.getvalue()


def _here(rank: int) -> bool:
    return torch.distributed.get_rank() == rank


@contextlib.contextmanager
def _loss(step: int, rank: int, value: float) -> Iterator[None]:
    def poisoned(self: Run, loss_mask: torch.Tensor, losses: torch.Tensor) -> Any:
        bad = self.args.curr_iteration + 1 == step and _here(rank)
        return loss(self, loss_mask, losses * value if bad else losses)

    loss = Run.loss
    with mock.patch.object(Run, "loss", poisoned):
        yield


@contextlib.contextmanager
def _teacher(step: int, rank: int, value: float) -> Iterator[None]:
    def poisoned(self: TeacherHost, *args: Any, **named: Any) -> list[torch.Tensor]:
        bad = self.args.curr_iteration + 1 == step and _here(rank)
        return [state * value if bad else state for state in states(self, *args, **named)]

    states = TeacherHost.states
    with mock.patch.object(TeacherHost, "states", poisoned):
        yield


def _last_weight(model: torch.nn.Module) -> torch.nn.Parameter:
    return [weight for weight in model.parameters() if weight.requires_grad][-1]


@contextlib.contextmanager
def _gradient(step: int, rank: int, value: float) -> Iterator[None]:
    """The last weight's of the rank's stage, from the first step that runs on."""

    def poisoned(self: Run, data_iterator: Any, model: Any, *args: Any) -> Any:
        if model.training and not hooks and _here(rank):

            def hook(gradient: torch.Tensor) -> torch.Tensor:
                bad = self.args.curr_iteration + 1 == step
                return torch.full_like(gradient, value) if bad else gradient

            hooks.append(_last_weight(model).register_hook(hook))
        return forward_step(self, data_iterator, model, *args)

    hooks: list[Any] = []
    forward_step = Run.forward_step
    with mock.patch.object(Run, "forward_step", poisoned):
        yield


def _between_update_and_save(
    spoil: Callable[[Any, Any, float], None], step: int, rank: int, value: float
) -> Any:
    """Spoil the model or the optimizer; then the run ends, if its flags have it end so."""

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        result = train_step(*args, **kwargs)
        if kwargs["iteration"] + 1 == step:
            _ask_to_end(get_args())
            if _here(rank):
                spoil(args[2][0], args[3], value)
        return result

    train_step = training.train_step
    return mock.patch.object(training, "train_step", poisoned)


def _ask_to_end(args: Any) -> None:
    if args.exit_signal_handler:
        signal.raise_signal(signal.SIGTERM)
    if args.exit_duration_in_mins:
        training._TRAIN_START_TIME = 0.0


def _weight(model: Any, optimizer: Any, value: float) -> None:
    _last_weight(model).data.fill_(value)


def _frozen_weight(model: Any, optimizer: Any, value: float) -> None:
    _last_weight(model).requires_grad_(False).data.view(-1)[-1] = value


def _expert_weight(model: Any, optimizer: Any, value: float) -> None:
    [weight] = [weight for name, weight in model.named_parameters() if ".experts." in name][-1:]
    weight.data.view(-1)[-1] = value


def _main_weight(model: Any, optimizer: Any, value: float) -> None:
    """Of a bf16 model: its copy comes of it at the next update."""
    inner = getattr(optimizer, "chained_optimizers", [optimizer])[0].optimizer
    inner.param_groups[-1]["params"][-1].data.view(-1)[-1] = value


def _moment(model: Any, optimizer: Any, value: float) -> None:
    inner = getattr(optimizer, "chained_optimizers", [optimizer])[0].optimizer
    list(inner.state.values())[-1]["exp_avg_sq"].view(-1)[-1] = value


SPOILT = (_weight, _frozen_weight, _expert_weight, _main_weight, _moment)
POISONS = {"loss": _loss, "teacher": _teacher, "gradient": _gradient}
POISONS |= {
    spoil.__name__[1:]: functools.partial(_between_update_and_save, spoil) for spoil in SPOILT
}
