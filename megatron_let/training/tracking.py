"""TensorBoard and Weights & Biases over a run's many starts, and a record of each start.

Megatron opens both by itself. What is added here: TensorBoard is always on beside the checkpoints,
a W&B run keeps its id when a job is requeued, and works without network.
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import uuid
from argparse import Namespace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from megatron_let.console import say
from megatron_let.errors import UsageError
from megatron_let.files import write_whole
from megatron_let.program import as_lines
from megatron_let.upstream.secrets import scrubbed

ROOT = Path(__file__).resolve().parents[2]
WANDB_ID_FILE = "wandb_run_id.txt"
PACKAGES = (
    "megatron-core torch transformer-engine apex flash-attn transformers tokenizers numpy "
    "triton nvidia-nccl-cu12 nvidia-nccl-cu13"
).split()
ENVIRONMENT = """
CUDA_DEVICE_MAX_CONNECTIONS CUDA_LAUNCH_BLOCKING CUDA_VISIBLE_DEVICES GLOO_SOCKET_IFNAME
MASTER_ADDR MASTER_PORT NCCL_ALGO NCCL_DEBUG NCCL_IB_DISABLE NCCL_IB_HCA NCCL_NET NCCL_NVLS_ENABLE
NCCL_P2P_DISABLE NCCL_PROTO NCCL_SOCKET_IFNAME NVTE_FLASH_ATTN NVTE_FUSED_ATTN OMP_NUM_THREADS
PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF SLURM_CPUS_PER_TASK SLURM_GPUS_ON_NODE SLURM_JOB_ID
SLURM_JOB_NAME SLURM_JOB_NODELIST SLURM_JOB_NUM_NODES SLURM_JOB_PARTITION SLURM_NTASKS
SLURM_RESTART_COUNT TORCHELASTIC_RESTART_COUNT TORCHELASTIC_RUN_ID WORLD_SIZE
""".split()
"""The variables that are recorded; others may be secrets, by whatever name."""
LARGEST_DIFF_BYTES = 1_000_000


def tracker_defaults(args: Namespace) -> dict[str, Any]:
    """Prepare the trackers that Megatron will open; returns defaults for its flags.

    `args` are as parsed, before Megatron has acted on them. Raises UsageError if W&B is asked for
    and has nowhere to keep its files.
    """
    if args.wandb_project:
        _prepare_wandb(args)
    if args.save is None or args.tensorboard_dir is not None:
        return {}
    return {"tensorboard_dir": str(Path(args.save) / "tensorboard")}


def _prepare_wandb(args: Namespace) -> None:
    """Set W&B's environment on the rank that opens it; what the user has set stays."""
    if args.save is None:
        raise UsageError(
            f"--wandb-project {args.wandb_project} needs --save: a later start finds the id there."
        )
    if int(os.environ["RANK"]) != int(os.environ["WORLD_SIZE"]) - 1:
        return
    os.environ.setdefault("WANDB_RUN_ID", _wandb_id(Path(args.save).resolve()))
    os.environ.setdefault("WANDB_RESUME", "allow")
    if "WANDB_MODE" not in os.environ and not _reachable():
        os.environ["WANDB_MODE"] = "offline"
        folder = args.wandb_save_dir or f"{args.save}/wandb"
        say(
            "> W&B's host does not answer: the run is logged offline (WANDB_MODE=online insists). "
            f"Where it does, send it with: wandb sync {folder}/wandb/offline-run-*"
        )


def _wandb_id(save: Path) -> str:
    """The id that the run's first start chose; a copy of its folder is a run of its own."""
    path = save / WANDB_ID_FILE
    known, *homes = path.read_text().strip().split("\n") if path.is_file() else [""]
    is_copy = any(home != str(save) and Path(home, WANDB_ID_FILE).exists() for home in homes)
    if not known or is_copy:
        known = uuid.uuid4().hex[:12]
    if homes != [str(save)]:
        save.mkdir(parents=True, exist_ok=True)
        write_whole(path, f"{known}\n{save}")
    return known


def _reachable() -> bool:
    """Whether W&B's host takes connections; behind a proxy nobody can tell, and W&B may try."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return True
    url = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    address = (url.hostname or "", url.port or {"http": 80}.get(url.scheme, 443))
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=5):
        return True
    return False


# --- a record of each start --------------------------------------------------------------------


def record_start(save: Path, args: Namespace) -> None:
    """Write what this start of a run consists of beside its checkpoints.

    `starts/iter_0000150_20261122-093000-123456-x.json`: the command line, all of Megatron's
    arguments, the versions of what computes, the state of this repository and the job's
    environment; for its owner's eyes, and without what looks like a secret. Beside it the flags
    as a run file, `.flags`.
    """
    now = datetime.datetime.now(datetime.UTC)
    folder = save / "starts"
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "time": now.isoformat(timespec="seconds"),
        "iteration": args.iteration,
        "command": sys.argv,
        "versions": _versions(),
        "git": git_state(ROOT),
        "host": platform.node(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "arguments": dict(sorted(vars(args).items())),
    }
    # A file of its own for each start, which its owner alone can read.
    name = f"iter_{args.iteration:07d}_{now:%Y%m%d-%H%M%S-%f}-"
    descriptor, path = tempfile.mkstemp(".json", name, folder)
    flags = Path(path).with_suffix(".flags")
    flags.touch(mode=0o600)
    flags.write_text(as_lines(scrubbed(sys.argv[1:])))
    with open(descriptor, "w") as file:
        json.dump(scrubbed(record), file, indent=1, default=lambda value: scrubbed(str(value)))
        file.write("\n")


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit and what differs from it; None where this is no repository."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    diff = _git(folder, "diff", "HEAD") or ""
    if len(diff.encode()) > LARGEST_DIFF_BYTES:
        diff = f"more than {LARGEST_DIFF_BYTES} bytes"
    status = (_git(folder, "status", "--porcelain") or "").splitlines()
    return {"commit": commit.strip(), "changed": status, "diff": diff}


def _git(folder: Path, *words: str) -> str | None:
    command = ["git", "--no-optional-locks", "-c", f"safe.directory={folder}", "-C", str(folder)]
    try:
        return subprocess.check_output(
            [*command, *words], stderr=subprocess.DEVNULL, text=True, errors="replace", timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None
