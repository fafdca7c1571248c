"""The optional accelerators: which of them are here, and what their absence switches off."""

import functools
import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from megatron_let.console import say
from megatron_let.upstream import cpu

WITHOUT: dict[str, tuple[str, dict[str, Any]]] = {
    "Transformer Engine": (
        "local layers, no fused rope",
        {"transformer_impl": "local", "apply_rope_fusion": False},
    ),
    "NVIDIA Apex": (
        "no fused norm, no fused softmax",
        {"no_persist_layer_norm": True, "masked_softmax_fusion": False},
    ),
    # Transformer Engine does not replace them: its students, too, end in Megatron's own output
    # layer, which asks for this extension and refuses to be built without it.
    "Apex's CUDA extensions": ("no fused weight gradient", {"gradient_accumulation_fusion": False}),
}
"""What a missing accelerator means, in words and as defaults of Megatron's flags."""


def platform_defaults() -> dict[str, Any]:
    """Defaults of Megatron's flags that this machine's packages call for; tells the user once.

    On CPU no package would help, so none is named.
    """
    on_cpu = cpu.is_active()
    defaults: dict[str, Any] = {"distributed_backend": "gloo"} if on_cpu else {}
    missing = [name for name, present in accelerators().items() if not present]
    for name in missing:
        defaults |= WITHOUT[name][1]
    if missing and not on_cpu:
        means = ", ".join(WITHOUT[name][0] for name in missing)
        _tell_once(f"> without {', '.join(missing)}: {means} (docs/install.md: how to add them)")
    return defaults


def accelerators() -> dict[str, bool]:
    """Whether the optional accelerators can be used here; on CPU none of them can.

    PyPI's `apex` is an unrelated package, told apart by its missing `apex.optimizers`.
    """
    if cpu.is_active():
        return dict.fromkeys(WITHOUT, False)
    return {
        "Transformer Engine": _is_found(find_spec, "transformer_engine.pytorch"),
        "NVIDIA Apex": _is_found(find_spec, "apex.optimizers"),
        # Loaded, as Megatron does.
        "Apex's CUDA extensions": _is_found(import_module, "fused_weight_gradient_mlp_cuda"),
    }


@functools.cache
def _tell_once(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        say(line)


def _is_found(find: Callable[[str], Any], name: str) -> bool:
    try:
        return find(name) is not None
    except Exception:  # another ABI, a driver
        return False
