"""Run Megatron-LM's own, unmodified `pretrain_gpt.py` on CPU, as `pretrain_let.py` runs there.

    python benchmarks/run_upstream.py ~/Megatron-LM <Megatron-LM's flags>

From the checkout come the root-level scripts alone (`pretrain_gpt.py`, `gpt_builders.py`,
`model_provider.py`); everything they import from `megatron` is the installed megatron-core.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_let.upstream import cpu  # noqa: E402

cpu.activate()  # before Megatron is imported, which reads torch.compile at import

import megatron.core  # noqa: E402
from megatron.training.arguments import add_megatron_arguments  # noqa: E402

from benchmarks import turns  # noqa: E402
from megatron_let.upstream import accelerators  # noqa: E402
from megatron_let.upstream.datasets import PREBUILT_HELPERS  # noqa: E402
from megatron_let.upstream.mended import TORCH_NORM  # noqa: E402
from megatron_let.upstream.table import apply  # noqa: E402

SCRIPT = "pretrain_gpt.py"
IMPORTED_SCRIPTS = ("gpt_builders.py", "model_provider.py")
"""What `pretrain_gpt.py` imports from beside itself."""


def main() -> None:
    """Load the scripts of the checkout that the first argument names, and run the last."""
    checkout = Path(sys.argv[1]).resolve()
    _check_core(checkout)
    apply([PREBUILT_HELPERS, TORCH_NORM])
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron demands it with TP
    for name in IMPORTED_SCRIPTS:
        import_script(checkout / name)
    script = str(checkout / SCRIPT)
    sys.argv = [script, *as_flags(accelerators.platform_defaults()), *sys.argv[2:]]
    turns.install_if_wanted()
    run_as_main(script)


def _check_core(checkout: Path) -> None:
    core = Path(megatron.core.__file__).resolve()
    if core.is_relative_to(checkout):
        sys.exit(f"megatron.core is the checkout's ({core}), not the installed megatron-core.")


def import_script(path: Path) -> None:
    """Import one file; its folder on `sys.path` would add the checkout's `megatron` to ours."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)


def run_as_main(script: str) -> None:
    """Execute a script as `__main__`.

    Not by `runpy`, which would make it the module that the processes Megatron spawns for a
    checkpoint import first: this file must be that, so that they find the scripts and the CPU.
    """
    source = Path(script).read_text()
    exec(compile(source, script, "exec"), {"__name__": "__main__", "__file__": script})


def as_flags(values: dict[str, Any]) -> list[str]:
    """Write argument values as the flags of Megatron's command line that set them."""
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    flags: list[str] = []
    for name, value in values.items():
        actions = [action for action in parser._actions if action.dest == name]
        switches = [action for action in actions if action.nargs == 0 and action.const == value]
        if switches:
            flags.append(switches[0].option_strings[0])
        elif not isinstance(value, bool):
            flags += [actions[0].option_strings[0], str(value)]
    return flags


if __name__ == "__main__":
    main()
