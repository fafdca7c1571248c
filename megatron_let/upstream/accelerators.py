"""The optional accelerators: which of them are here, and what their absence switches off."""

import functools
import importlib
import importlib.util
import os
from typing import Any, NamedTuple

from megatron_let.console import say
from megatron_let.upstream import cpu


class Without(NamedTuple):
    """What a missing accelerator means, in words and as defaults of Megatron's flags."""

    means: str
    defaults: dict[str, Any]


WITHOUT = {
    "Transformer Engine": Without(
        "local layers, no fused rope", {"transformer_impl": "local", "apply_rope_fusion": False}
    ),
    "NVIDIA Apex": Without(
        "no fused norm, no fused softmax",
        {"no_persist_layer_norm": True, "masked_softmax_fusion": False},
    ),
    # Transformer Engine does not replace them: its students, too, end in Megatron's own output
    # layer, which asks for this extension and refuses to be built without it.
    "Apex's CUDA extensions": Without(
        "no fused weight gradient", {"gradient_accumulation_fusion": False}
    ),
}


def platform_defaults() -> dict[str, Any]:
    """Defaults of Megatron's flags that this machine's packages call for; tells the user once.

    What is missing changes what `WITHOUT` says; a flag on the command line still wins. On CPU no
    package would help, so none is named.
    """
    on_cpu = cpu.is_active()
    defaults: dict[str, Any] = {"distributed_backend": "gloo"} if on_cpu else {}
    missing = [name for name, present in accelerators().items() if not present]
    for name in missing:
        defaults |= WITHOUT[name].defaults
    if missing and not on_cpu:
        means = ", ".join(WITHOUT[name].means for name in missing)
        _tell_once(
            f"> without {', '.join(missing)}: {means} (docs/install.md says how to add them)"
        )
    return defaults


def accelerators() -> dict[str, bool]:
    """Whether the optional accelerators can be used here; on CPU none of them can.

    PyPI's `apex` is an unrelated package, told apart by its missing `apex.optimizers`.
    """
    gpu = not cpu.is_active()
    return {
        "Transformer Engine": gpu and _exists("transformer_engine.pytorch"),
        "NVIDIA Apex": gpu and _exists("apex.optimizers"),
        "Apex's CUDA extensions": gpu and _imports("fused_weight_gradient_mlp_cuda"),
    }


@functools.cache
def _tell_once(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        say(line)


def _imports(name: str) -> bool:
    """Whether an extension module loads, which is what Megatron tries."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
