"""The optimizers and their schedule, resumable.

Upstream tells groups of parameters apart by their peak learning rate, so that another --lr finds
none of its own, and starts the schedule anew where no optimizer is loaded. Without Transformer
Engine and Apex: their Adam keeps its step once; PyTorch's keeps one tensor per parameter, which
three places of `DistributedOptimizer` overlook when they load a checkpoint.
"""

import functools
import inspect
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import distrib_optimizer, optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training import get_args, training


class TorchAdamDistributedOptimizer(distrib_optimizer.DistributedOptimizer):
    """`DistributedOptimizer` that loads the state of PyTorch's Adam."""

    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, **kwargs: Any
    ) -> Any:
        """Upstream asserts that a step is there before it makes the state to load into."""
        if is_loading and not self.optimizer.state:
            self.init_state_fn(self.optimizer, self.config)
            for state in self.optimizer.state.values():
                state["step"] = torch.zeros(())
        return super().sharded_state_dict(model_sharded_state_dict, is_loading, **kwargs)

    def load_state_dict(self, state_dict: Any) -> None:
        """Upstream gives all parameters one step tensor, which each of them would count up."""
        super().load_state_dict(state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: Any) -> None:
        """Upstream expects the step, which `load_state_dict` has set, among the sharded tensors."""
        super()._set_main_param_and_optimizer_states(model_param, {"step": None, **tensors})


def _load_schedule(scheduler: Any, state_dict: Any) -> None:
    """With --override-opt-param-scheduler the loaded groups get this run's learning rates, too."""
    inspect.unwrap(OptimizerParamScheduler.load_state_dict)(scheduler, state_dict)
    for group in scheduler.optimizer.param_groups if scheduler.override_opt_param_scheduler else ():
        if not group.get("is_decoupled_lr"):
            group |= {"max_lr": scheduler.max_lr, "min_lr": scheduler.min_lr}


def _set_up(*args: Any, **kwargs: Any) -> Any:
    """With --no-load-optim the schedule goes on at the checkpoint's sample."""
    made = inspect.unwrap(training.setup_model_and_optimizer)(*args, **kwargs)
    scheduler, run = made[2], get_args()
    if scheduler is not None and run.iteration > 0 and scheduler.num_steps == 0:
        scheduler.step(increment=run.consumed_train_samples)
    return made


def install() -> None:
    """Have Megatron build and resume optimizers in this way."""
    keys = (key for key in optimizer.param_group_identifier_keys if key not in ("max_lr", "min_lr"))
    optimizer.param_group_identifier_keys = tuple(keys)
    distrib_optimizer.param_group_identifier_keys = optimizer.param_group_identifier_keys
    for owner, name, ours in (
        (OptimizerParamScheduler, "load_state_dict", _load_schedule),
        (training, "setup_model_and_optimizer", _set_up),
    ):
        setattr(owner, name, functools.update_wrapper(ours, inspect.unwrap(getattr(owner, name))))
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        megatron_optimizer.DistributedOptimizer = TorchAdamDistributedOptimizer
