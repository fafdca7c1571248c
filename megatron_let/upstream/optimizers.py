"""The optimizers and their schedule, resumable.

Without Transformer Engine and Apex: their Adam keeps its step once; PyTorch's keeps one tensor per
parameter, which three places of `DistributedOptimizer` overlook when they load a checkpoint.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.training import get_args

from megatron_let.upstream.table import Redirect, alike, around


class TorchAdamDistributedOptimizer(distrib_optimizer.DistributedOptimizer):
    """`DistributedOptimizer` that loads the state of PyTorch's Adam."""

    def sharded_state_dict(self, *args: Any, **named: Any) -> Any:
        """Upstream asserts that a step is there before it makes the state to load into."""
        _make_state(self)
        return super().sharded_state_dict(*args, **named)

    def load_state_dict(self, state_dict: Any) -> None:
        """Upstream gives all parameters one step tensor, which each of them would count up."""
        super().load_state_dict(state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: Any) -> None:
        """Upstream expects the step, which `load_state_dict` has set, among the sharded tensors."""
        super()._set_main_param_and_optimizer_states(model_param, {"step": None, **tensors})


@around
def _with_state(sharded_state_dict: Callable[..., Any], self: Any, *args: Any, **named: Any) -> Any:
    if self.init_state_fn is None:
        self.init_state_fn = _momentum_of_zeros
    _make_state(self)
    return sharded_state_dict(self, *args, **named)


def _make_state(wrapper: Any) -> None:
    """What a first step would make of the state, if there was none yet."""
    if wrapper.optimizer.state:
        return
    wrapper.init_state_fn(wrapper.optimizer, wrapper.config)
    for state in wrapper.optimizer.state.values() if _is_torch_adam(wrapper.optimizer) else ():
        state["step"] = torch.zeros(())


@around
def _with_step(load_state_dict: Callable[..., None], self: Any, state_dict: Any) -> None:
    saved = state_dict.get("optimizer", state_dict)["state"]
    is_counted = "common_step" in saved or any("step" in state for state in saved.values())
    if _is_torch_adam(self.optimizer) and not is_counted:
        saved["common_step"] = torch.zeros(())
    load_state_dict(self, state_dict)


def _momentum_of_zeros(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """What SGD begins with, where it has a momentum."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("momentum") else ():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def _is_torch_adam(optimizer: torch.optim.Optimizer) -> bool:
    """It keeps a step beside its moments; a saved zero is left out by Megatron."""
    return isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))


def _without_rates(identifiers: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(key for key in identifiers if key not in ("max_lr", "min_lr"))


@around
def _with_rates(load_state_dict: Callable[..., None], scheduler: Any, state_dict: Any) -> None:
    load_state_dict(scheduler, state_dict)
    is_overridden = scheduler.override_opt_param_scheduler
    for group in scheduler.optimizer.param_groups if is_overridden else ():
        if not group.get("is_decoupled_lr"):
            group |= {"max_lr": scheduler.max_lr, "min_lr": scheduler.min_lr}


@around
def _schedule_goes_on(set_up: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    made = set_up(*args, **kwargs)
    scheduler, run = made[2], get_args()
    if scheduler is not None and run.iteration > 0 and scheduler.num_steps == 0:
        scheduler.step(increment=run.consumed_train_samples)
    return made


def _of_torch_adam(upstreams: type) -> type:
    return upstreams if distrib_optimizer.HAVE_APEX_OR_TE else TorchAdamDistributedOptimizer


_MADE, _TRAINING = "megatron.core.optimizer", "megatron.training.training"
_OWNERS = f"{_MADE}.optimizer.FP32Optimizer {_MADE}.optimizer.Float16OptimizerWithFloat16Params"
_GROUPS = f"{_MADE}.optimizer {_MADE}.distrib_optimizer"
_SCHEDULER = "megatron.core.optimizer_param_scheduler.OptimizerParamScheduler"
REDIRECTS = [
    # Before a step (fp16 skips the first); and SGD has no function that makes its state.
    *alike(_OWNERS, "sharded_state_dict", _with_state, "does not save what a resume asks for"),
    *alike(_OWNERS, "load_state_dict", _with_step, "PyTorch's Adam wants the step that was zero"),
    # Or another --lr would find no group of its own in the checkpoint.
    *alike(_GROUPS, "param_group_identifier_keys", _without_rates, "tells groups by their rates"),
    # With --override-opt-param-scheduler.
    Redirect(_SCHEDULER, "load_state_dict", _with_rates, "groups keep the checkpoint's rates"),
    # With --no-load-optim.
    Redirect(_TRAINING, "setup_model_and_optimizer", _schedule_goes_on, "the schedule starts anew"),
    Redirect(_MADE, "DistributedOptimizer", _of_torch_adam, "cannot load PyTorch's Adam"),
]
