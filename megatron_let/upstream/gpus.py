"""No run falls back to the CPU in silence where this machine promises GPUs.

Imports torch only to ask why: a tool can use it before it knows whether it needs torch.
"""

import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from megatron_let.console import show
from megatron_let.errors import first_line

COUNTS = "SLURM_GPUS_ON_NODE SLURM_GPUS_PER_NODE SLURM_GPUS_PER_TASK SLURM_GPUS".split()
"""What a job was given, as a number or as `a100:8`."""
INDICES = "SLURM_JOB_GPUS SLURM_STEP_GPUS GPU_DEVICE_ORDINAL CUDA_VISIBLE_DEVICES".split()
HIDDEN = ("", "-1", "NoDevFiles")  # no index, by torch and by Slurm
FIRST_RANK_SECONDS = 30
"""The other ranks wait: torchrun ends all with the first, which must have spoken by then."""


def promise(environment: Mapping[str, str], root: Path = Path("/")) -> str | None:
    """Return what says that there are GPUs here; None if nothing does.

    Devices that `CUDA_VISIBLE_DEVICES` hides are no promise, but a job's GPUs are.
    """
    for name in COUNTS:
        numbers = [part.split(":")[-1] for part in environment.get(name, "").split(",")]
        if any(number.isdecimal() and int(number) > 0 for number in numbers):
            return f"{name}={environment[name]}"
    for name in INDICES:
        if environment.get(name, "").strip() not in HIDDEN:
            return f"{name}={environment[name]}"
    if "CUDA_VISIBLE_DEVICES" in environment:
        return None
    devices = sorted((root / "dev").glob("nvidia[0-9]*"))
    files = [*devices, root / "dev/nvidiactl", root / "proc/driver/nvidia"]
    return next((str(file) for file in files if file.exists()), None)


def reason() -> str:
    """Return why torch cannot use a GPU, in its own words where it has some."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return "it is a build without CUDA"
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return first_line(error).rstrip(".")
    return "it counts no device"


def fall_back(line: str, way_out: str = "--cpu", told: TextIO | None = None) -> None:
    """Say `line` on the first rank (to `told`); end the process where GPUs are promised.

    Its status 1 lets a scheduler try another node. `way_out` is the flag that asks for the CPU.
    """
    found = promise(os.environ)
    if found is None:
        if os.environ.get("RANK", "0") == "0":
            show(line, told or sys.stdout)
        return
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(FIRST_RANK_SECONDS)
        sys.exit(1)
    import torch

    sys.exit(
        f"{Path(sys.argv[0]).name}: error: GPUs are promised here ({found}), but torch "
        f"{torch.__version__} cannot use them: {reason()}. Mend that, or add {way_out} to run on "
        "the CPU."
    )


def check_accelerators(argv: Sequence[str]) -> None:
    """Load them before Megatron does, which takes no error but an `ImportError` for their absence.

    What is broken is left out, in a line. A broken Transformer Engine ends the process, unless
    someone has asked for layers without it.
    """
    if importlib.util.find_spec("transformer_engine") is not None:
        try:
            importlib.import_module("transformer_engine.pytorch")
        except Exception as error:  # a missing package, another ABI, a driver
            if "--transformer-impl local" not in " ".join(argv).replace("=", " "):
                sys.exit(
                    f"{Path(sys.argv[0]).name}: error: Transformer Engine is installed and cannot "
                    f"be loaded ({type(error).__name__}: {first_line(error)}). Mend or uninstall "
                    "it, or add --transformer-impl local to go on without."
                )
            for name in ("transformer_engine", "transformer_engine_torch"):
                sys.modules[name] = None  # type: ignore[assignment]
    for name in ("apex", "fused_weight_gradient_mlp_cuda"):
        try:
            importlib.import_module(name)
        except ImportError:
            continue
        except Exception as error:
            sys.modules[name] = None  # type: ignore[assignment]
            if os.environ.get("RANK", "0") == "0":
                why = f"{type(error).__name__}: {first_line(error)}"
                show(f"> {name} is left out: it cannot be loaded ({why})", sys.stdout)
