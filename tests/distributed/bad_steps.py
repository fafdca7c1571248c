"""Run in a worker: training with something that is not finite in one step on one rank."""

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

import pretrain_let
from megatron_let import run_log
from megatron_let.methods.with_teacher import TeacherMethod
from megatron_let.run import Run
from megatron_let.run_log import RunLog
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
    off = ("check_gradients", "check_weights") * (not checked)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", ["pretrain_let.py", *argv]))
        for name in off:
            stack.enter_context(mock.patch.object(run_log, name, lambda *args: None))
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
    def poisoned(self: TeacherMethod, *args: Any) -> list[torch.Tensor]:
        bad = self.args.curr_iteration + 1 == step and _here(rank)
        return [state * value if bad else state for state in states(self, *args)]

    states = TeacherMethod.teacher_states
    with mock.patch.object(TeacherMethod, "teacher_states", poisoned):
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


@contextlib.contextmanager
def _weight(step: int, rank: int, value: float) -> Iterator[None]:
    """Between the update and the save."""

    def remembering(self: Run, data_iterator: Any, model: Any, *args: Any) -> Any:
        chunks[:] = [model]
        return forward_step(self, data_iterator, model, *args)

    def poisoned(self: RunLog, loss_dict: Any) -> None:
        if self._iteration == step and _here(rank):
            _last_weight(chunks[0]).data.fill_(value)
        count_step(self, loss_dict)

    chunks: list[Any] = []
    forward_step, count_step = Run.forward_step, RunLog._count_step
    with (
        mock.patch.object(Run, "forward_step", remembering),
        mock.patch.object(RunLog, "_count_step", poisoned),
    ):
        yield


POISONS = {"loss": _loss, "teacher": _teacher, "gradient": _gradient, "weight": _weight}
