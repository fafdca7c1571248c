"""What is not finite ends the run before it reaches a checkpoint.

Megatron looks at gradients from a start's second step on, and only with its flag. Here the norm is
looked at that it has computed and brought to the host in any case, and weights and optimizer when
they are saved; neither makes a training step wait.
"""

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.training.async_utils import maybe_finalize_async_save

from megatron_let.upstream.loop_hooks import Listener, Save, Step


class FiniteCheck(Listener):
    """Ends the run where an update, or what is to be saved, is not finite."""

    def __init__(self, count_bad_losses: Callable[[], int]) -> None:
        self._count_bad_losses = count_bad_losses
        """Of the step, on this rank; it waits."""

    def after_step(self, step: Step) -> None:
        """Look at the norm of the gradients that the update was made from."""
        norm = step.grad_norm
        if step.is_skipped or norm is None or math.isfinite(norm):
            return
        losses = {name: value for name, value in step.reported.items() if "loss" in name}
        also = [name for name, value in losses.items() if not value.isfinite().all()]
        also += [f"the loss on rank {rank}" for rank in ranks_with(self._count_bad_losses())]
        end_run(
            f"step {step.number}: the norm of the gradients is {norm}"
            f"{'; not finite either: ' * bool(also)}{', '.join(also)}. Nothing of this step is "
            "saved: start again to go on from the newest checkpoint, with --iterations-to-skip "
            f"{step.number} to leave this step's batch out."
        )

    def before_save(self, save: Save) -> None:
        """Look at weights and optimizer state."""
        weights = [named for chunk in save.chunks for named in chunk.named_parameters()]
        saved = [*weights, *_optimizer_state(save.optimizer)]
        largest = torch.nn.utils.get_total_norm([tensor.detach() for _, tensor in saved], math.inf)
        bad = ""
        if not math.isfinite(largest):
            bad = next((n for n, tensor in saved if not tensor.isfinite().all()), "a weight")
        for rank, name in enumerate(gathered(bad)):
            if name:
                end_run(
                    f"step {save.step}: {name.replace('module.', '')} on rank {rank} is not "
                    "finite, so the step is not saved: start again to go on from the newest "
                    "checkpoint, perhaps with a smaller --lr."
                )


def _optimizer_state(optimizer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Main weights and moments: a moment can overflow where gradients and weights do not."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)  # None: no weight of this rank is trained
        for group in inner.param_groups if inner else ():
            yield from (("the optimizer's main weight", weight) for weight in group["params"])
        for state in inner.state.values() if inner else ():
            for name, value in state.items():
                if torch.is_tensor(value) and value.is_floating_point():
                    yield f"the optimizer's {name}", value


def gathered(value: Any) -> list[Any]:
    """What each rank has; called on every rank."""
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, value)
    return every


def ranks_with(count: int) -> list[int]:
    """The ranks whose count is not zero; called on every rank."""
    return [rank for rank, found in enumerate(gathered(int(count))) if found]


def end_run(message: str) -> None:
    """End the run with one message; called on every rank."""
    maybe_finalize_async_save(blocking=True, terminate=True)  # an earlier step's
    if torch.distributed.get_rank() == 0:
        print(f"pretrain_let.py: error: {message}", file=sys.stderr, flush=True)
    torch.distributed.barrier()  # or torchrun ends rank 0 with the others, before it has spoken
    sys.exit(1)
