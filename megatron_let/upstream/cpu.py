"""The CPU platform: unmodified Megatron-Core trains without a GPU, on gloo.

Megatron calls `torch.cuda` everywhere. `activate()` redirects those calls, once, at start-up, and
only where no GPU is there and none promised (`gpus.py`), or `--cpu` is given. Every
redirect stands in one of the tables below with its reason, and a test checks that each name still
exists upstream. A `TorchFunctionMode` would be shorter, but costs 24-29 % of a tiny step; patched
factories cost nothing measurable.

Call `activate()` before the first import of Megatron: `megatron.core.jit` reads `torch.compile`
when it is imported.
"""

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_let.upstream import gpus
from megatron_let.upstream.streams import Event, Stream, in_order
from megatron_let.upstream.table import Redirect, apply, instead

CPU = torch.device("cpu")


# ----------------------------------------------------------------------------------------------
# What a GPU call becomes
# ----------------------------------------------------------------------------------------------


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int)  # Megatron's integers are `torch.cuda.current_device()`


def _factory_on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return on_cpu


def _to_on_cpu(to: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(to)
    def on_cpu(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and not isinstance(args[0], (int, torch.Tensor)) and _names_cuda(args[0]):
            args = (CPU, *args[1:])
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        return to(self, *args, **kwargs)

    return on_cpu


def _type_as_cuda(tensor_type: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(tensor_type)
    def as_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = tensor_type(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.") if isinstance(result, str) else result

    return as_cuda


def _compile_nothing(compiler: Any) -> Callable[..., Any]:
    def compile_nothing(model: Any = None, **kwargs: Any) -> Any:
        return (lambda function: function) if model is None else model

    return compile_nothing


def _without_nccl(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def without_nccl(*args: Any, **kwargs: Any) -> Any:
        for device in ("device_id", "device_ids"):
            kwargs.pop(device, None)
        if kwargs.get("backend") == "nccl":
            kwargs["backend"] = "gloo"
        return function(*args, **kwargs)

    return without_nccl


def _on_one_device(group_class: type) -> type:
    """`ProcessGroupGloo` with one device for all groups of the process.

    A gloo device has a thread that never rests, and Megatron makes a group for everything, each by
    default with a device of its own: an idle process with sixty groups took 0.11 of a core, with
    one device for all 0.005.
    """

    @functools.cache
    def device() -> Any:
        return group_class.create_default_device()  # type: ignore[attr-defined]

    class OnOneDevice(group_class):  # type: ignore[misc, valid-type]
        """Built as `torch.distributed` builds a gloo group."""

        def __init__(self, store: Any, rank: int, size: int, **kwargs: Any) -> None:
            options = group_class._Options()  # type: ignore[attr-defined]
            options._devices = [device()]
            options._timeout = kwargs["timeout"]
            if kwargs.get("enable_reconfigure"):  # of torch 2.13 and newer
                options.enable_reconfigure = True
            super().__init__(store, rank, size, options)

    return OnOneDevice


def _returns(make_value: Callable[[], Any]) -> Callable[[Any], Any]:
    """A redirect that ignores its arguments.

    Each redirect is a function object of its own: torch._dynamo, which every optimizer imports,
    keeps a table of torch's functions by identity and refuses one that has two names.
    """
    return lambda original: lambda *args, **kwargs: make_value()


def _loader_with_generator(init: Callable[..., None]) -> Callable[..., None]:
    """`DataLoader.__init__` that seeds its workers from a generator of its own.

    By default each iterator draws a seed from the CPU generator. That one stands in for the GPU's
    here, so a resumed run, which makes its iterators after loading the state, would drop out
    other activations than the uninterrupted run.
    """

    @functools.wraps(init)
    def with_generator(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("generator", torch.Generator())
        init(self, *args, **kwargs)

    return with_generator


def _says_process(tell: Callable[..., None]) -> Callable[..., None]:
    """Each process is a GPU to Megatron, whose log says so."""

    @functools.wraps(tell)
    def says_process(text: str, *args: Any, **kwargs: Any) -> None:
        text = text.replace("per GPU (TFLOP/s/GPU)", "per process (TFLOP/s/process)")
        tell(text.replace("TFLOP/s/GPU", "TFLOP/s/process"), *args, **kwargs)

    return says_process


def _set_rng_state(original: Any) -> Callable[..., None]:
    return lambda new_state, *args, **kwargs: torch.set_rng_state(new_state)


def _manual_seed(original: Any) -> Callable[[int], Any]:
    return lambda seed: torch.default_generator.manual_seed(seed)


def _itself(original: Any) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: self


_NOTHING = _returns(lambda: None)
_ZERO = _returns(lambda: 0)
_get_rng_state = _returns(torch.get_rng_state)
_PROPERTIES = SimpleNamespace(name="cpu", major=8, minor=0, total_memory=0, multi_processor_count=1)

# ----------------------------------------------------------------------------------------------
# What is redirected, and why
# ----------------------------------------------------------------------------------------------

_FACTORIES = (
    "arange as_tensor empty empty_like empty_strided eye full full_like linspace ones ones_like "
    "rand rand_like randint randn randn_like randperm tensor tril_indices triu_indices zeros "
    "zeros_like"
).split()

TORCH_REDIRECTS: list[Redirect] = [
    *(Redirect("torch", name, _factory_on_cpu, "called with device='cuda'") for name in _FACTORIES),
    Redirect("torch.Tensor", "to", _to_on_cpu, "called with device='cuda'"),
    Redirect("torch.Tensor", "cuda", _itself, "moves a batch or weight to the GPU"),
    Redirect("torch.Tensor", "pin_memory", _itself, "page-locked memory needs a CUDA driver"),
    Redirect("torch.Tensor", "type", _type_as_cuda, "optimizers compare with torch.cuda.*Tensor"),
    Redirect("torch.nn.Module", "cuda", _itself, "moves the model to the GPU"),
    Redirect("torch.nn.Module", "to", _to_on_cpu, "called with device='cuda'"),
    Redirect("torch", "compile", _compile_nothing, "jit_fuser: compiling costs more than it saves"),
    Redirect("torch.cuda", "current_device", _returns(lambda: CPU), "device= of buffers"),
    Redirect(
        "torch.cuda",
        "device_count",
        _returns(lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
        "0 skips set-up",
    ),
    Redirect("torch.cuda", "set_device", _NOTHING, "one device"),
    Redirect("torch.cuda", "get_device_capability", _returns(lambda: (8, 0)), "checks"),
    Redirect("torch.cuda", "get_device_properties", _returns(lambda: _PROPERTIES), "checks"),
    Redirect("torch.cuda", "get_device_name", _returns(lambda: "cpu"), "logs"),
    Redirect("torch.cuda", "synchronize", _NOTHING, "timers, p2p, DDP"),
    Redirect("torch.cuda", "empty_cache", _NOTHING, "no caching allocator"),
    Redirect("torch.cuda", "memory_allocated", _ZERO, "memory report"),
    Redirect("torch.cuda", "max_memory_allocated", _ZERO, "memory report"),
    Redirect("torch.cuda", "memory_reserved", _ZERO, "memory report"),
    Redirect("torch.cuda", "max_memory_reserved", _ZERO, "memory report"),
    Redirect("torch.cuda", "memory_stats", _returns(dict), "memory report"),
    Redirect("torch.cuda", "reset_peak_memory_stats", _NOTHING, "memory report"),
    Redirect("torch.cuda", "Stream", instead(Stream), "DDP's communication stream"),
    Redirect("torch.cuda", "Event", instead(Event), "timing"),
    Redirect("torch.cuda", "stream", instead(in_order), "DDP's communication stream"),
    Redirect("torch.cuda", "set_stream", _NOTHING, "one stream"),
    Redirect("torch.cuda", "current_stream", _returns(Stream), "DDP's communication stream"),
    Redirect("torch.cuda", "default_stream", _returns(Stream), "DDP's communication stream"),
    Redirect("torch.cuda", "is_current_stream_capturing", _returns(lambda: False), "graphs"),
    Redirect("torch.cuda", "manual_seed", _manual_seed, "RNG"),
    Redirect("torch.cuda", "get_rng_state", _get_rng_state, "RNG"),
    Redirect("torch.cuda", "set_rng_state", _set_rng_state, "RNG"),
    Redirect("torch.cuda.nvtx", "range_push", _NOTHING, "profiling ranges"),
    Redirect("torch.cuda.nvtx", "range_pop", _NOTHING, "profiling ranges"),
    Redirect(
        "torch.utils.data.DataLoader",
        "__init__",
        _loader_with_generator,
        "draws from the generator that dropout uses",
    ),
    Redirect("torch.distributed", "init_process_group", _without_nccl, "default backend is nccl"),
    Redirect("torch.distributed", "new_group", _without_nccl, "groups named nccl"),
    Redirect(
        "torch.distributed.distributed_c10d",
        "ProcessGroupGloo",
        _on_one_device,
        "each group has a device, whose thread never rests",
    ),
    Redirect("torch.distributed", "barrier", _without_nccl, "device_ids is for nccl"),
]

MEGATRON_REDIRECTS: list[Redirect] = [
    Redirect(
        "megatron.core.tensor_parallel.random",
        "_get_cuda_rng_state",
        _get_rng_state,
        "the tensor-parallel RNG states are forks of the CPU generator",
    ),
    Redirect(
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        _set_rng_state,
        "the tensor-parallel RNG states are forks of the CPU generator",
    ),
    Redirect(
        "megatron.training.training",
        "initialize_megatron",
        lambda original: functools.partial(original, allow_no_cuda=True),
        "asserts that CUDA is there",
    ),
    *(
        Redirect("megatron.training.training", name, _says_process, "counts TFLOP/s of GPUs")
        for name in ("print_rank_last", "append_to_progress_log")
    ),
]

# ----------------------------------------------------------------------------------------------


def is_active() -> bool:
    """Whether the redirects are in place."""
    return torch.cuda.Stream is Stream


def activate() -> None:
    """Redirect Megatron's GPU calls to the CPU; a second call does nothing."""
    if is_active():
        return
    # `with torch.device("meta")`, in which Hugging Face models are built, knows the factories from
    # a cached set: it must hold the originals, or every model is built, and initialised, for real.
    _device_constructors()
    apply(TORCH_REDIRECTS)
    quieten()
    apply(MEGATRON_REDIRECTS)


def activate_if_wanted(argv: list[str] | None = None, work: str = "training") -> None:
    """Activate the CPU platform if there is no GPU or `--cpu` is among `argv`.

    Args:
        argv: the command line, this process's by default.
        work: what is then done on the CPU, for the user to read.

    Raises:
        SystemExit: GPUs are promised that torch cannot use, and nobody has asked for the CPU.
    """
    argv = sys.argv if argv is None else argv
    if "--cpu" in argv or is_active():
        activate()
    elif not torch.cuda.is_available():
        if not {"-h", "--help"} & set(argv):
            gpus.fall_back(f"no GPU: {work} on CPU")
        activate()


def quieten() -> None:
    """Silence what is true of every CPU run and nobody can act on; before Megatron's import."""
    for message in (
        ".*pin_memory.*",
        ".*Apex (is|are) not installed.*",
        ".*Transformer Engine.*",
        ".*transformer-engine.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    # Forks of the CPU generator stand in for the GPU's, so a draw "changes the CPU RNG state".
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime"
