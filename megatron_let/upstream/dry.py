"""A rank that is alone, on tensors with shapes and no contents: what it does, seen from below.

It runs on the CPU platform (`cpu.py`), below Megatron's fake process group; what else is replaced
for it stands here with the reasons. `before_megatron()` comes after `cpu.activate()`.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from megatron_let.upstream.table import Redirect, alike, applied, apply, around, by, returns

# --- bytes that live, FLOPs, collectives ----------------------------------------------------------

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ITEM = torch.ops.aten._local_scalar_dense.default
SHAPED_BY_CONTENTS = {
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
}


def _attention_flops(
    query: Any, key: Any, value: Any, dropout: float = 0.0, is_causal: bool = False, **_: Any
) -> float:
    """Causal attention is half of the square, as Megatron counts it."""
    return sdpa_flop_count(query.shape, key.shape, value.shape) / (1 + is_causal)


FLOPS = flop_registry | {ATTENTION: _attention_flops}
"""Of an operation, by its arguments; torch knows no CPU's attention."""


class Watch(TorchDispatchMode):
    """Follows every operation on fake tensors while it is active.

    A storage counts from the operation that made it until nothing holds it any more. What the host
    would read of a tensor without contents is zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0
        self.now = 0  # bytes that live
        self.peak = 0  # the most of them since somebody set it
        self.reads = 0  # how often the host asked for contents, which waits for a GPU
        self.collectives: dict[tuple[str, str], tuple[int, int]] = {}
        """How many, and bytes of the largest tensor of each, by group and kind."""
        self._sizes: dict[int, list[int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do what was asked for, and note what it makes."""
        kwargs = kwargs or {}
        if func is ITEM and isinstance(args[0], FakeTensor) and args[0].constant is None:
            self.reads += 1
            dtype = args[0].dtype
            return False if dtype is torch.bool else 0.0 if dtype.is_floating_point else 0
        self.reads += func in SHAPED_BY_CONTENTS
        if func.namespace == "c10d":
            self._count(func, args)
        out = func(*args, **kwargs)
        if (formula := FLOPS.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor) and tensor.fake_device.type != "meta":
                self._note(tensor)
        return out

    def _count(self, func: Any, args: tuple) -> None:
        leaves = tree_leaves(args)
        boxed = next(leaf for leaf in leaves if isinstance(leaf, torch.ScriptObject))
        group = torch.distributed.ProcessGroup.unbox(boxed)
        if group.size() == 1:
            return
        kind = func._schema.name.removeprefix("c10d::").strip("_")
        key = group.group_desc.removesuffix("_GROUP"), kind
        sizes = (leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
        number, total = self.collectives.get(key, (0, 0))
        self.collectives[key] = number + 1, total + max(sizes, default=0)

    def _note(self, tensor: FakeTensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if (known := self._sizes.get(key)) is None:
            self._sizes[key] = known = [0]
            weakref.finalize(storage, self._forget, key, known)
        self.now += size - known[0]
        known[0] = size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int, known: list[int]) -> None:
        self.now -= known[0]
        if self._sizes.get(key) is known:
            del self._sizes[key]


def bytes_of(tensors: Iterable[torch.Tensor | None]) -> int:
    """Of all the storages that some tensors lie in."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


# --- what stands in for Megatron's and torch's functions ------------------------------------------

_CUDA, _DIST, _MODULE = "torch.cuda", "torch.distributed", "torch.nn.Module"
_RANDOM, _CLIP = "megatron.core.tensor_parallel.random", "megatron.core.optimizer.clip_grads"
_BUFFER = "megatron.core.distributed.param_and_grad_buffer"
_NO_CONTENTS = "reads what no tensor holds here"


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


@around
def _in_this_process(init: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    own: dict[str, Any] = {"num_workers": 0, "pin_memory": False, "persistent_workers": False}
    own |= dict.fromkeys(["prefetch_factor", "multiprocessing_context", "worker_init_fn"])
    init(*args, **kwargs | own)


@around
def real(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The function on tensors with contents, as those of the data are."""
    with _disable_current_modes():
        return function(*args, **kwargs)


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


def kernels(watch: Watch) -> list[Redirect]:
    """Stand-ins for Transformer Engine's: local layers would keep the scores of attention."""

    def attend(self: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        # Transformer Engine copies a part of the joint projection, which then can go.
        inputs = (tensor.contiguous() for tensor in (query, key, value))
        return _FlashAttention.apply(*inputs, watch).flatten(2)

    def norm(self: Any, hidden: Any) -> Any:
        return _RMSNorm.apply(hidden, self.weight)

    attention = "megatron.core.transformer.dot_product_attention.DotProductAttention"
    said = "keeps what the GPU's kernel does not"
    return [
        Redirect(attention, "forward", by(attend), said),
        Redirect("torch.nn.RMSNorm", "forward", by(norm), said),
    ]


# --- tables -------------------------------------------------------------------------------------

_together = contextlib.nullcontext(SimpleNamespace(wait=lambda: True, is_completed=lambda: True))
"""Collectives of which each, with the handle of all, has nothing to do."""
_no_norm = by(lambda *tensors: (torch.zeros(1), None))
TORCH = [
    *alike(_CUDA, "manual_seed set_rng_state", returns(None), _NO_CONTENTS),
    Redirect(_CUDA, "get_rng_state", returns("state"), _NO_CONTENTS),
    Redirect("torch.Tensor", "record_stream", returns(None), "there is one stream"),
    Redirect("torch", "allclose", returns(True), _NO_CONTENTS),
    Redirect(_MODULE, "_apply", by(_apply), "swaps parameters, which fake ones do not allow"),
    Redirect(_DIST, "all_gather_object", by(_gather_object), "objects travel as contents"),
    *alike(_DIST, "broadcast_object_list barrier", returns(None), "nobody else is there"),
    Redirect("torch.utils.data.DataLoader", "__init__", _in_this_process, "modes end at processes"),
]
MEGATRON = [
    Redirect(_RANDOM, "_get_cuda_rng_state", returns("state"), _NO_CONTENTS),
    Redirect(_RANDOM, "_set_cuda_rng_state", returns(None), _NO_CONTENTS),
    Redirect(_BUFFER, "_coalescing_manager", returns(_together), "the fake backend has none"),
    Redirect(_CLIP, "l2_norm_impl", _no_norm, "without Apex the host reads each gradient's norm"),
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
