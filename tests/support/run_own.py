"""Runs a script such as `pretrain_gpt.py` on CPU: python -m tests.support.run_own SCRIPT FLAGS."""

import os
import sys
from pathlib import Path

from benchmarks.run_upstream import IMPORTED_SCRIPTS, as_flags, import_script, run_as_main
from megatron_let.upstream.accelerators import platform_defaults
from megatron_let.upstream.datasets import PREBUILT_HELPERS
from megatron_let.upstream.mended import TORCH_NORM
from megatron_let.upstream.table import apply

if __name__ == "__main__":
    script = Path(sys.argv[1])
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    apply([PREBUILT_HELPERS, TORCH_NORM])
    for name in IMPORTED_SCRIPTS:
        if (script.parent / name).exists():
            import_script(script.parent / name)
    sys.argv = [str(script), *as_flags(platform_defaults()), *sys.argv[2:]]
    run_as_main(str(script))
