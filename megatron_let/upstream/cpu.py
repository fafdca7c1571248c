"""The CPU platform: unmodified Megatron-Core trains without a GPU, on gloo.

Megatron calls `torch.cuda` everywhere. `activate()` redirects those calls, before the first import
of Megatron (`megatron.core.jit` reads `torch.compile` then). A `TorchFunctionMode` would be shorter
than the tables below, but costs 24-29 % of a tiny step; patched factories cost nothing measurable.
"""

import contextlib
import functools
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_let.upstream import gpus
from megatron_let.upstream.table import Redirect, alike, apply, around, by, instead, returns

CPU = torch.device("cpu")

# --- what a GPU call becomes --------------------------------------------------------------------


def _names_cuda(device: Any) -> bool:
    # Megatron's integers are `torch.cuda.current_device()`.
    return isinstance(device, int) or str(device).startswith("cuda")


@around
def _factory_on_cpu(factory: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if _names_cuda(kwargs.get("device")):
        kwargs["device"] = CPU
    if kwargs.get("pin_memory"):
        kwargs["pin_memory"] = False
    return factory(*args, **kwargs)


@around
def _to_on_cpu(to: Callable[..., Any], this: Any, *others: Any, **kwargs: Any) -> Any:
    if _names_cuda(kwargs.get("device")):
        kwargs["device"] = CPU
    if others and not isinstance(others[0], (int, torch.Tensor)) and _names_cuda(others[0]):
        others = (CPU, *others[1:])
    return to(this, *others, **kwargs)


@around
def _without_nccl(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    for device in ("device_id", "device_ids"):
        kwargs.pop(device, None)
    if kwargs.get("backend") == "nccl":
        kwargs["backend"] = "gloo"
    return function(*args, **kwargs)


@around
def _loader_with_generator(init: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """`DataLoader.__init__` that seeds its workers from a generator of its own.

    By default each iterator draws one from the CPU generator, which stands in for the GPU's: a
    resumed run, which makes its iterators after loading the state, would have another dropout.
    """
    init(*args, **{"generator": torch.Generator()} | kwargs)


@around
def _says_process(say: Callable[..., None], text: str, *others: Any, **named: Any) -> None:
    """Each process is a GPU to Megatron, whose log says so."""
    text = text.replace("per GPU (TFLOP/s/GPU)", "per process (TFLOP/s/process)")
    say(text.replace("TFLOP/s/GPU", "TFLOP/s/process"), *others, **named)


def _note_progress(save: str | None, text: str, barrier: bool = True) -> None:
    """`append_to_progress_log`, in those words; Megatron reads a line's fields by their places."""
    if save is None or os.environ["RANK"] != "0":
        return
    when, job = time.strftime("%Y-%m-%d %H:%M:%S"), os.environ.get("SLURM_JOB_ID", "")
    fields = when, f"Job ID: {job}", f"# processes: {os.environ['WORLD_SIZE']}", text
    with open(f"{save}/progress.txt", "a") as file:
        file.write("\t".join(fields).replace("TFLOP/s/GPU", "TFLOP/s/process") + "\n")


@around
def _type_as_cuda(tensor_type: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    result = tensor_type(*args, **kwargs)
    return result.replace("torch.", "torch.cuda.") if isinstance(result, str) else result


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


def _without_cuda(initialize: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(initialize, allow_no_cuda=True)


def _as_it_is(model: Any = None, **options: Any) -> Any:
    """`torch.compile` of nothing, called or as a decorator with options."""
    return (lambda function: function) if model is None else model


class Event(torch.cpu.Event):
    """The wall clock at the moment it was recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: Any = None) -> None:
        """Note the time."""
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds from this event to `end`."""
        return 1000 * (end._seconds - self._seconds)


class Stream(torch.cpu.Stream):
    """The one stream; all earlier work is already done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Neither device nor priority matters."""

    def record_event(self, event: Event | None = None) -> Event:  # type: ignore[override]
        """Return an event that has already happened."""
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """There is nothing to wait for."""


_itself = by(lambda self, *args, **kwargs: self)
_processes_here = by(lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
_get_rng_state = by(lambda *args, **kwargs: torch.get_rng_state())
_set_rng_state = by(lambda new_state, *args, **kwargs: torch.set_rng_state(new_state))
_PROPERTIES = SimpleNamespace(name="cpu", major=8, minor=0, total_memory=0, multi_processor_count=1)

# --- what is redirected, and why ----------------------------------------------------------------

_FACTORIES = (
    "arange as_tensor empty empty_like empty_strided eye full full_like linspace ones ones_like "
    "rand rand_like randint randn randn_like randperm tensor tril_indices triu_indices zeros "
    "zeros_like"
)
_MEMORY = "memory_allocated max_memory_allocated memory_reserved max_memory_reserved"
_MOVED, _CUDA, _DATA = "torch.Tensor torch.nn.Module", "torch.cuda", "torch.utils.data.DataLoader"
_C10D = "torch.distributed.distributed_c10d"
_RANDOM, _TRAINING = "megatron.core.tensor_parallel.random", "megatron.training.training"
_NOTING = f"{_TRAINING} megatron.training.checkpointing"

TORCH_REDIRECTS: list[Redirect] = [
    *alike("torch", _FACTORIES, _factory_on_cpu, "called with device='cuda'"),
    *alike(_MOVED, "to", _to_on_cpu, "called with device='cuda'"),
    *alike(_MOVED, "cuda", _itself, "moves a batch, a weight or the model to the GPU"),
    Redirect("torch.Tensor", "pin_memory", _itself, "page-locked memory needs a CUDA driver"),
    Redirect("torch.Tensor", "type", _type_as_cuda, "optimizers compare with torch.cuda.*Tensor"),
    Redirect("torch", "compile", by(_as_it_is), "jit_fuser: compiling costs more than it saves"),
    Redirect(_CUDA, "current_device", returns(CPU), "device= of buffers"),
    Redirect(_CUDA, "device_count", _processes_here, "0 skips set-up"),
    *alike(_CUDA, "set_device set_stream", returns(None), "one device, one stream"),
    Redirect(_CUDA, "get_device_capability", returns((8, 0)), "checks"),
    Redirect(_CUDA, "get_device_properties", returns(_PROPERTIES), "checks"),
    Redirect(_CUDA, "get_device_name", returns("cpu"), "logs"),
    *alike(_CUDA, "synchronize empty_cache reset_peak_memory_stats", returns(None), "no device"),
    *alike(_CUDA, _MEMORY, returns(0), "memory report"),
    Redirect(_CUDA, "memory_stats", returns({}), "memory report"),
    Redirect(_CUDA, "Event", instead(Event), "timing"),
    Redirect(_CUDA, "Stream", instead(Stream), "DDP's communication stream"),
    Redirect(_CUDA, "stream", by(contextlib.nullcontext), "DDP's communication stream"),
    *alike(_CUDA, "current_stream default_stream", by(Stream), "DDP's communication stream"),
    Redirect(_CUDA, "is_current_stream_capturing", returns(False), "graphs"),
    Redirect(_CUDA, "manual_seed", by(torch.default_generator.manual_seed), "RNG"),
    Redirect(_CUDA, "get_rng_state", _get_rng_state, "RNG"),
    Redirect(_CUDA, "set_rng_state", _set_rng_state, "RNG"),
    *alike("torch.cuda.nvtx", "range_push range_pop", returns(None), "profiling ranges"),
    Redirect(_DATA, "__init__", _loader_with_generator, "draws from dropout's generator"),
    *alike("torch.distributed", "init_process_group new_group barrier", _without_nccl, "for nccl"),
    Redirect(_C10D, "ProcessGroupGloo", _on_one_device, "each group has a thread that never rests"),
]

MEGATRON_REDIRECTS: list[Redirect] = [
    Redirect(_RANDOM, "_get_cuda_rng_state", _get_rng_state, "its states fork the CPU generator's"),
    Redirect(_RANDOM, "_set_cuda_rng_state", _set_rng_state, "its states fork the CPU generator's"),
    Redirect(_TRAINING, "initialize_megatron", _without_cuda, "asserts that CUDA is there"),
    Redirect(_TRAINING, "print_rank_last", _says_process, "TFLOP/s of GPUs"),
    *alike(_NOTING, "append_to_progress_log", instead(_note_progress), "counts GPUs"),
]


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
    # Megatron takes what it can import, and their kernels know no CPU.
    for name in "transformer_engine transformer_engine_torch apex flash_attn".split():
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    # What is true of every CPU run, and nobody can act on; before Megatron's import.
    nobodys = ".*(pin_memory|Apex (is|are) not installed|[Tt]ransformer[ -][Ee]ngine)"
    warnings.filterwarnings("ignore", message=nobodys)
    # Forks of the CPU generator stand in for the GPU's, so a draw "changes the CPU RNG state".
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime"
    apply(MEGATRON_REDIRECTS)


def activate_if_wanted(argv: list[str] | None = None, work: str = "training") -> None:
    """Activate the CPU platform if there is no GPU or `--cpu` is among `argv` (`sys.argv`).

    `work` is what the user reads is then done there. Ends the process where GPUs are promised that
    torch cannot use, and nobody has asked for the CPU.
    """
    argv = sys.argv if argv is None else argv
    if "--cpu" in argv or is_active():
        activate()
    elif not torch.cuda.is_available():
        if not {"-h", "--help"} & set(argv):
            gpus.fall_back(f"no GPU: {work} on CPU")
        activate()
    else:
        gpus.check_accelerators(argv)
