"""A rank that is alone, on tensors with shapes and no contents: what is replaced for it, and why.

It runs on the CPU platform (`cpu.py`), below Megatron's fake process group. `before_megatron()`
comes after `cpu.activate()`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from megatron_let.upstream.cpu import by, returns
from megatron_let.upstream.table import Redirect, alike, applied, apply, instead
from megatron_let.upstream.watch import Watch

_CUDA, _DIST, _MODULE = "torch.cuda", "torch.distributed", "torch.nn.Module"
_RANDOM, _TRAINING = "megatron.core.tensor_parallel.random", "megatron.training.training"
_NO_CONTENTS = "reads what no tensor holds here"


class Done:
    """The handle of a collective that has nothing to do."""

    def wait(self, *args: Any) -> bool:
        """Not at all."""
        return True

    def is_completed(self) -> bool:
        """It is."""
        return True


def _apply(self: Any, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    for child in self.children():
        child._apply(change)
    for key, parameter in self._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            changed = change(parameter)
        if (changed.dtype, changed.device) != (parameter.dtype, parameter.device):
            new = torch.nn.Parameter(changed, parameter.requires_grad)
            new.__dict__.update(parameter.__dict__ | new.__dict__)
            self._parameters[key] = new
    for key, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[key] = change(buffer)
    return self


def _gather_object(gathered: list[Any], value: Any, group: Any = None) -> None:
    gathered[:] = [value] * len(gathered)


def _in_this_process(make: Callable[..., None]) -> Callable[..., None]:
    own = {"num_workers": 0, "pin_memory": False, "persistent_workers": False}
    own |= dict.fromkeys(["prefetch_factor", "multiprocessing_context", "worker_init_fn"])  # type: ignore[arg-type]

    @functools.wraps(make)
    def loader(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs | own)

    return loader


@contextlib.contextmanager
def _together(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[Done]:
    yield Done()


def real(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on tensors with contents, as those of the data are."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return called


# --- what a GPU's kernels keep ------------------------------------------------------------------


class _FlashAttention(torch.autograd.Function):
    """Causal attention that keeps its inputs, its output and a number for each row and head."""

    @staticmethod
    def forward(ctx: Any, query_SBHD: Any, key_SBGD: Any, value_SBGD: Any, watch: Watch) -> Any:
        length, rows, heads, width = query_SBHD.shape
        ctx.watch, ctx.flops = watch, 2.0 * rows * heads * length * key_SBGD.size(0) * width
        watch.flops += ctx.flops  # two products over half of the sequence
        out = query_SBHD.new_empty(length, rows, heads, value_SBGD.size(-1))
        sums = query_SBHD.new_empty(rows, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query_SBHD, key_SBGD, value_SBGD, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        ctx.watch.flops += 2 * ctx.flops
        return *(torch.empty_like(saved) for saved in ctx.saved_tensors[:3]), None


class _RMSNorm(torch.autograd.Function):
    """A norm that keeps its input and a number for each token."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any) -> Any:
        scale = hidden.new_empty(hidden.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(hidden, weight, scale)
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:2])


def _flash(watch: Watch) -> Callable[..., Any]:
    def forward(self: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        # Transformer Engine copies a part of the joint projection, which then can go.
        inputs = (tensor.contiguous() for tensor in (query, key, value))
        return _FlashAttention.apply(*inputs, watch).flatten(2)

    return forward


def kernels(watch: Watch) -> list[Redirect]:
    """Stand-ins for Transformer Engine's: local layers would keep the scores of attention."""
    core, said = "megatron.core.transformer", "keeps what the GPU's kernel does not"
    attention = f"{core}.dot_product_attention.DotProductAttention"
    norm = lambda self, hidden: _RMSNorm.apply(hidden, self.weight)  # noqa: E731
    return [
        Redirect(attention, "forward", instead(_flash(watch)), said),
        Redirect("torch.nn.RMSNorm", "forward", instead(norm), said),
    ]


# --- tables -------------------------------------------------------------------------------------

TORCH = [
    *alike(_CUDA, "manual_seed set_rng_state", returns(None), _NO_CONTENTS),
    Redirect(_CUDA, "get_rng_state", returns("state"), _NO_CONTENTS),
    Redirect("torch.Tensor", "record_stream", returns(None), "there is one stream"),
    Redirect("torch", "allclose", returns(True), _NO_CONTENTS),
    Redirect(_MODULE, "_apply", instead(_apply), "swaps parameters, which fake ones do not allow"),
    Redirect(_DIST, "all_gather_object", by(_gather_object), "objects travel as contents"),
    *alike(_DIST, "broadcast_object_list barrier", returns(None), "nobody else is there"),
    Redirect("torch.utils.data.DataLoader", "__init__", _in_this_process, "modes end at processes"),
]
MEGATRON = [
    Redirect(_RANDOM, "_get_cuda_rng_state", returns("state"), _NO_CONTENTS),
    Redirect(_RANDOM, "_set_cuda_rng_state", returns(None), _NO_CONTENTS),
    Redirect(
        "megatron.core.distributed.param_and_grad_buffer",
        "_coalescing_manager",
        instead(_together),
        "the fake group's backend has none",
    ),
    Redirect(
        "megatron.core.optimizer.clip_grads",
        "l2_norm_impl",
        by(lambda *tensors: (torch.zeros(1), None)),
        "without Apex each gradient's norm is read by the host",
    ),
]


def before_megatron() -> None:
    """Replace what Megatron keeps by names of its own."""
    torch.autograd.set_multithreading_enabled(False)  # the modes are of this thread
    apply(TORCH)


@contextlib.contextmanager
def without_contents(watch: Watch, redirects: list[Redirect]) -> Iterator[None]:
    """Run what is inside on fake tensors, and `watch` it."""
    with applied([*MEGATRON, *redirects]), FakeTensorMode(allow_non_fake_inputs=True), watch:
        yield
