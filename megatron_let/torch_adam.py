"""The distributed optimizer, resumable without Transformer Engine and Apex.

Their Adam keeps its step once; PyTorch's keeps one tensor per parameter, which three places of
`DistributedOptimizer` overlook when they load a checkpoint.
"""

from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import distrib_optimizer


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


def install() -> None:
    """Have Megatron build this optimizer where it would use PyTorch's Adam."""
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        megatron_optimizer.DistributedOptimizer = TorchAdamDistributedOptimizer
