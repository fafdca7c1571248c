"""What a program does, seen from below: bytes that live, FLOPs, collectives."""

import weakref
from collections import Counter
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

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
        self.now = 0
        """Bytes that live."""
        self.peak = 0
        """The most of them since somebody set it."""
        self.reads = 0
        """How often the host asked for contents, which waits for a GPU."""
        self.collectives: Counter[tuple[str, str]] = Counter()
        """How many, by group and kind."""
        self.collective_bytes: Counter[tuple[str, str]] = Counter()
        """Of the largest tensor of each."""
        self._sizes: dict[int, list[int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do what was asked for, and note what it makes."""
        kwargs = kwargs or {}
        if func is ITEM and isinstance(args[0], FakeTensor) and args[0].constant is None:
            self.reads += 1
            return _zero(args[0].dtype)
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
        self.collectives[key] += 1
        sizes = (leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
        self.collective_bytes[key] += max(sizes, default=0)

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


def _zero(dtype: torch.dtype) -> bool | float | int:
    return False if dtype is torch.bool else 0.0 if dtype.is_floating_point else 0


def bytes_of(tensors: Any) -> int:
    """Of all the storages that some tensors lie in."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
