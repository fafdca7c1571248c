"""The GPU path without a GPU: ranks of a layout on fake CUDA tensors, a process each.

`test_fake_cuda.py` runs this file. Megatron is imported once; every case is a fork.

What a fake CUDA tensor needs of a CUDA build without a driver: autograd asks whether a device has a
primary context, and the answer is an error. `allow_backward` puts a copy of that table of virtual
functions in its place whose entry says no. That is too fragile for users, whose dry run is on fake
CPU tensors (`megatron_let/dry_run`); it sees neither of what this is for: tensors on the wrong
device, and places where the host waits for the device.
"""
# ruff: noqa: E402, the device comes before Megatron

import contextlib
import ctypes
import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from megatron_let.upstream import cpu, dry
from megatron_let.upstream.dry import ITEM, SHAPED_BY_CONTENTS, Watch
from megatron_let.upstream.table import Redirect, alike, apply, instead
from tests.distributed import fake_te

ROOT = Path(__file__).resolve().parents[2]
aten = torch.ops.aten
NO_FAKE_CUDA = 3
"""Exit status where the trick does not hold."""
SLOTS = 400  # more than the table has; the copy may go on behind its end
_kept: list[Any] = []


def allow_backward() -> None:
    """Let autograd run backward over fake CUDA tensors."""
    torch._C._ensureCUDADeviceGuardSet()
    folder = Path(torch.__file__).parent
    header = (folder / "include/ATen/detail/AcceleratorHooksInterface.h").read_text()
    body = header.partition("struct TORCH_API AcceleratorHooksInterface")[2]
    virtual = [line for line in body.splitlines() if line.strip().startswith("virtual ")]
    # The destructor comes first and takes two places.
    place = 1 + next(i for i, line in enumerate(virtual) if "hasPrimaryContext" in line)
    hooks_of = ctypes.CDLL(str(folder / "lib/libtorch_cpu.so"))._ZN2at6detail12getCUDAHooksEv
    hooks_of.restype = ctypes.c_void_p
    hooks = ctypes.cast(hooks_of(), ctypes.POINTER(ctypes.c_void_p))
    slots = ctypes.cast(hooks[0], ctypes.POINTER(ctypes.c_void_p))
    no = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda self, index: False)
    table = (ctypes.c_void_p * (SLOTS + 2))(*(slots[i - 2] for i in range(SLOTS + 2)))
    table[2 + place] = ctypes.cast(no, ctypes.c_void_p).value
    _kept.extend([no, table])
    hooks[0] = ctypes.addressof(table) + 16


# --- what is watched ----------------------------------------------------------------------------


def place() -> str:
    """Where in Megatron or in ours the program is, innermost first."""
    own = ("/megatron/", "/megatron_let/", "/tests/")
    frames = [f for f in traceback.extract_stack() if any(part in f.filename for part in own)]
    ours = [f for f in frames if not f.filename.endswith(("fake_cuda.py", "dry.py"))]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in ours[::-1][:3])


class Waits(Watch):
    """Notes as well where the host waits for the device; a collective of the CPU's is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at the operation before it is done."""
        self._look(func, args, kwargs or {})
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _look(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if func.namespace == "c10d":
            tensors = [t for t in tree_leaves(args) if isinstance(t, FakeTensor)]
            if any(t.device.type != "cuda" for t in tensors):
                raise RuntimeError(f"{func} of a CPU tensor at {place()}")
        on_gpu = [isinstance(arg, FakeTensor) and arg.device.type == "cuda" for arg in args]
        if func is ITEM or func in SHAPED_BY_CONTENTS:
            self._wait(func.__name__, on_gpu[0])
        elif func is aten._to_copy.default and "device" in kwargs:
            crosses = on_gpu[0] != (torch.device(kwargs["device"]).type == "cuda")
            self._wait("copy", crosses and not kwargs.get("non_blocking"))
        elif func is aten.copy_.default:
            self._wait("copy_", on_gpu[0] != on_gpu[1] and not (len(args) > 2 and args[2]))
        elif func is aten.index.Tensor and on_gpu[0]:
            indices = [index for index in args[1] if index is not None]
            bad = any(i.dtype is torch.bool or i.device.type == "cpu" for i in indices)
            self._wait("index", bad)

    def _wait(self, what: str, is_one: bool) -> None:
        if is_one:
            self.waits[f"{what} at {place()}"] += 1


# --- a GPU of which only the shapes are known ---------------------------------------------------

_CUDA = "torch.cuda"
A100 = SimpleNamespace(
    name="A100", major=8, minor=0, total_memory=80 * 2**30, multi_processor_count=108
)


class Stream(cpu.Stream):
    """Of a device."""

    cuda_stream = 0
    device = torch.device("cuda:0")


def _type_by_device(tensor_type: Callable[..., Any]) -> Callable[..., Any]:
    def typed(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = tensor_type(self, *args, **kwargs)
        if not isinstance(found, str):
            return found
        return f"torch.{'cuda.' * self.is_cuda}{found.rpartition('.')[2]}"

    return typed


_none, _zero = cpu.returns(None), cpu.returns(0)
GPU = [
    *alike(_CUDA, "is_available is_initialized is_bf16_supported", cpu.returns(True), "a GPU"),
    *alike(_CUDA, "_is_in_bad_fork is_current_stream_capturing", cpu.returns(False), "a GPU"),
    *alike(_CUDA, "init _lazy_init set_device synchronize empty_cache ipc_collect", _none, "a GPU"),
    *alike(_CUDA, "set_stream manual_seed_all reset_peak_memory_stats", _none, "a GPU"),
    *alike(_CUDA, "current_device memory_allocated max_memory_allocated", _zero, "a GPU"),
    *alike(_CUDA, "memory_reserved max_memory_reserved", _zero, "a GPU"),
    Redirect(_CUDA, "device_count", cpu.returns(8), "a GPU"),
    Redirect(_CUDA, "memory_stats", cpu.returns({}), "a GPU"),
    Redirect(_CUDA, "get_device_capability", cpu.returns((8, 0)), "a GPU"),
    Redirect(_CUDA, "get_device_name", cpu.returns("fake"), "a GPU"),
    Redirect(_CUDA, "get_device_properties", cpu.returns(A100), "a GPU"),
    Redirect(_CUDA, "Event", instead(cpu.Event), "a GPU"),
    Redirect(_CUDA, "Stream", instead(Stream), "a GPU"),
    Redirect(_CUDA, "stream", cpu.by(contextlib.nullcontext), "a GPU"),
    *alike(_CUDA, "current_stream default_stream", cpu.by(Stream), "a GPU"),
    *alike("torch.cuda.nvtx", "range_push range_pop", _none, "a GPU"),
    Redirect("torch", "compile", cpu.by(cpu._as_it_is), "nothing is run"),
    Redirect("torch.Tensor", "pin_memory", cpu._itself, "nothing is run"),
    Redirect("torch.Tensor", "type", _type_by_device, "says the device of a real one"),
]
STEP = [
    Redirect(
        "megatron.core.optimizer.clip_grads",
        "l2_norm_impl",
        cpu.by(lambda *tensors: (torch.zeros(1, device="cuda"), None)),
        "without Apex each gradient's norm is read by the host",
    ),
    Redirect(
        "megatron.training.training",
        "logical_and_across_model_parallel_group",
        instead(lambda value, group=None: value),
        "what is read is zero: every step would count as skipped",
    ),
    Redirect(
        "megatron.training.training",
        "reduce_max_stat_across_model_parallel_group",
        instead(lambda stat, group=None: 0.0),
        "a tensor is made of the norm, which is one already: no fake one",
    ),
]


def holds() -> bool:
    """Whether a fork can run backward on fake CUDA tensors."""
    if (child := os.fork()) == 0:
        allow_backward()
        with FakeTensorMode():
            torch.ones(2, device="cuda", requires_grad=True).sum().backward()
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[assignment,method-assign]
apply(GPU)
dry.before_megatron()
if not holds():
    sys.exit(NO_FAKE_CUDA)
allow_backward()
if TE := os.environ.get("FAKE_TE"):  # the folder of its wheel, unpacked
    fake_te.install(TE)

from megatron_let import pretrain
from megatron_let.dry_run.flags import RESULT
from megatron_let.dry_run.rank import DryRank

# --- what may be wrong --------------------------------------------------------------------------


def _states_on_the_cpu() -> None:
    """The teacher's states come from another device."""
    host = resolve_name("megatron_let.teacher.host:TeacherHost")
    right = host.states
    host.states = lambda *args, **named: [t.to("cpu") for t in right(*args, **named)]


def _mask_on_the_cpu() -> None:
    """The number of tokens is summed up on the CPU."""
    let = resolve_name("megatron_let.methods.let:Let")
    right = let._loss_scale
    let._loss_scale = lambda self, tokens: right(self, tokens.view(1).cpu())


def _loss_read() -> None:
    """The loss is read in every micro-batch."""
    losses = resolve_name("megatron_let.losses.table:LOSSES")
    right = losses["cosine"]

    def read(*states: torch.Tensor) -> torch.Tensor:
        found = right(*states)
        float(found.sum())
        return found

    losses["cosine"] = read


def _masked_tokens_picked() -> None:
    """Tokens are picked by a mask, whose length the host must know."""
    losses = resolve_name("megatron_let.losses.table:LOSSES")
    right = losses["cosine"]
    losses["cosine"] = lambda *states: right(*states) + 0 * states[1][states[1] > 0].sum()


def _weight_copied() -> None:
    """The weight of a step is made on the host, and copied to the device with a wait."""
    signal = resolve_name("megatron_let.methods.signal:Signal")
    signal.report = lambda self, loss, tokens, *_: {
        self.logged[1]: torch.full((1,), self.weight).to(loss.device)
    }


def _sums_on_the_cpu() -> None:
    """The step's sums are added up over ranks where NCCL cannot see them."""
    method = resolve_name("megatron_let.methods.guided:TeacherMethod")
    right = method.end_step

    def end_step(self: Any, is_skipped: bool = False) -> Any:
        torch.distributed.all_reduce(torch.zeros(3))
        return right(self, is_skipped)

    method.end_step = end_step


def _width_not_resized() -> None:
    """The teacher's states keep their width."""
    resize = resolve_name("megatron_let.losses.attach:Resize")
    resize.forward = lambda self, states: states


def _head_on_the_cpu() -> None:
    """The teacher's head stays where it was read."""
    teacher = resolve_name("megatron_let.teacher.stage:Teacher")
    right = teacher.head_rows
    teacher.head_rows = lambda self, *rows: (right(self, *rows)[0].cpu(), None)


FAULTS: dict[str, Callable[[], None]] = {
    "states on the CPU": _states_on_the_cpu,
    "mask on the CPU": _mask_on_the_cpu,
    "loss read": _loss_read,
    "masked tokens picked": _masked_tokens_picked,
    "weight copied": _weight_copied,
    "sums on the CPU": _sums_on_the_cpu,
    "width not resized": _width_not_resized,
    "head on the CPU": _head_on_the_cpu,
}

# --- a case -------------------------------------------------------------------------------------


class OnGpu(DryRank):
    """One rank of a dry run, on its device."""

    def __init__(self) -> None:
        super().__init__()
        self.watch = self.seen = Waits()

    def _redirects(self) -> list[Redirect]:
        others = [one for one in super()._redirects() if not TE or one.name != "model_config"]
        return [*others, *STEP]

    def _step(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        step = super()._step(train_step)

        def forgetting(*args: Any, **kwargs: Any) -> Any:
            self.seen.waits.clear()  # what counts is the last step, with all that comes after it
            return step(*args, **kwargs)

        return forgetting


def run_case(rank: int, world: int, flags: list[str], fault: str | None) -> dict[str, Any]:
    """Train two steps as one rank; `fault` is a key of `FAULTS`. Returns where the host waited."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
    sys.argv = ["pretrain_let.py", "--fake-process-group", *flags]
    if fault is not None:
        FAULTS[fault]()
    on_gpu = OnGpu()
    on_gpu.run(pretrain.train)
    return json.loads(Path(os.environ[RESULT]).read_text()) | {"waits": on_gpu.seen.waits}


def main(folder: Path) -> None:
    """Run the cases of `folder`, each in a fork; `NAME.json` becomes `NAME.found`."""
    for file in sorted(folder.glob("*.json")):
        if os.fork() == 0:
            os.environ[RESULT] = str(folder / "rank")
            log = os.open(file.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1), os.dup2(log, 2)
            try:
                found = run_case(**json.loads(file.read_text()))
            except BaseException as error:
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}"}
            file.with_suffix(".found").write_text(json.dumps(found))
            sys.stdout.flush()
            os._exit(0)
        os.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # a torn-down interpreter frees the table, which torch 2.15 asks once more
