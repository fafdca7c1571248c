"""Transformer Engine's Python layer with kernels that know shapes alone, for `fake_cuda.py`.

Its wheel of Python code is enough (`transformer_engine`, without the core library and the compiled
extension): what it finds as `transformer_engine_torch` are the functions below. They give results
of the right shape, dtype and device, and keep nothing; what is saved for the backward pass is the
Python layer's own choice, as on a GPU. A kernel that is not here is an error that names it.
"""

import importlib
import importlib.machinery
import itertools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

EXTENSION = "transformer_engine_torch"


class _Member:
    """A value of an enumeration whose values nobody knows here."""

    def __init__(self, kind: str, name: str, number: int) -> None:
        self.name, self._kind, self._number = name, kind, number

    def __int__(self) -> int:
        return self._number

    def __repr__(self) -> str:
        return f"{self._kind}.{self.name}"


class _Enumeration(type):
    """A class whose members come to be when they are asked for."""

    @property
    def __members__(cls) -> dict[str, _Member]:
        return {name: member for name, member in vars(cls).items() if isinstance(member, _Member)}

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        member = _Member(cls.__name__, name, len(cls.__members__))
        setattr(cls, name, member)
        return member


class Extension(ModuleType):
    """What takes the compiled extension's place."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        known: Any = _Enumeration(name, (), {}) if name[0].isupper() else _missing(name)
        setattr(self, name, known)
        return known


def _missing(name: str) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"Transformer Engine's kernel {name} is not known by its shapes")

    return kernel


# --- kernels ------------------------------------------------------------------------------------


def _floats(args: tuple) -> list[torch.Tensor]:
    return [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]


def rmsnorm_fwd(hidden: Any, weight: Any, epsilon: Any, out: Any, *_: Any) -> Any:
    """Of (tokens, H): the same, no means, a scale for each token."""
    scale = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    return (hidden * weight if out is None else out), None, scale


def rmsnorm_bwd(grad: Any, hidden: Any, scale: Any, weight: Any, *_: Any) -> Any:
    """Gradients of input and weight."""
    return hidden * grad, torch.empty_like(weight)


def generic_gemm(
    a: Any, transpose_a: bool, b: Any, transpose_b: bool, out: Any, *args: Any, **_: Any
) -> Any:
    """op(B) op(A) of matrices whose leading sizes count as one; also a bias' gradient."""
    rows, columns = (t.reshape(-1, t.shape[-1]) for t in (b, a))
    product = (rows.t() if transpose_b else rows) @ (columns.t() if transpose_a else columns)
    if not transpose_b:
        product = product.view(*b.shape[:-1], product.shape[-1])
    if out is not None:
        product = out.copy_(product.view(out.shape))
    return product, None, None, None


def fused_attn_fwd(*args: Any) -> Any:
    """Of queries (S, B, heads, D): their like, a sum for each row and head, the dropout's state."""
    query, _, value = _floats(args)[:3]
    length, rows, heads, _ = query.shape
    sums = query.new_empty(rows, heads, length, 1, dtype=torch.float32)
    return [query * value.new_ones(()), sums, query.new_empty(2, dtype=torch.int64)]


def fused_attn_bwd(*args: Any) -> Any:
    """Gradients of queries, keys and values."""
    query, key, value, _, grad = _floats(args)[:5]
    grads = [query * grad.new_ones(()), torch.empty_like(key), torch.empty_like(value)]
    return [*grads, None, None]


def _norm(*_: Any) -> Any:
    return tuple(torch.zeros(1, device="cuda") for _ in range(2))


def _like_the_first(tensor: Any, *_: Any, **__: Any) -> Any:
    return torch.empty_like(tensor)


def _returns(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _extension(asked_for: set[str]) -> Extension:
    found = Extension(EXTENSION)
    found.__spec__ = importlib.machinery.ModuleSpec(EXTENSION, None)
    attention = found.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen
    known = {kernel.__name__: kernel for kernel in KERNELS} | {
        "get_cublasLt_version": _returns(130000),
        "get_cudnn_version": _returns(91000),
        "get_num_cublas_streams": _returns(4),
        "get_fused_attn_backend": _returns((attention, "")),
        "fused_rope_forward": _like_the_first,
        "fused_rope_backward": _like_the_first,
        "multi_tensor_l2norm": _norm,
        "multi_tensor_adam": _returns(None),
        "multi_tensor_scale": _returns(None),
        "multi_tensor_scale_tensor": _returns(None),
    }
    for name, kernel in known.items():
        setattr(found, name, kernel)
    found.__all__ = sorted(asked_for | known.keys())  # the Python layer imports all by a star
    return found


KERNELS = (rmsnorm_fwd, rmsnorm_bwd, generic_gemm, fused_attn_fwd, fused_attn_bwd)


def install(folder: str) -> None:
    """Make `import transformer_engine` find the unpacked wheel in `folder`, on these kernels."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # no core library is looked for
    sys.path.append(folder)
    sources = Path(folder, "transformer_engine", "pytorch").rglob("*.py")
    names = (re.findall(r"\btex\.(\w+)", source.read_text()) for source in sources)
    sys.modules[EXTENSION] = _extension(set(itertools.chain(*names)))
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    attention = importlib.import_module("transformer_engine.pytorch.attention")
    kernels_of = attention.dot_product_attention.utils
    choose = kernels_of.get_attention_backend

    def get_attention_backend(parameters: Any) -> Any:
        parameters.qkv_type = torch.Tensor  # a fake one is of a type that no kernel takes
        return choose(parameters)

    kernels_of.get_attention_backend = get_attention_backend
