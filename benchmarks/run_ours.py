"""Run `pretrain_let.py`, in turns with another program if the environment says so (`turns.py`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_let.upstream import cpu  # noqa: E402

cpu.activate()  # before Megatron is imported, which reads torch.compile at import

from benchmarks import turns  # noqa: E402
from benchmarks.run_upstream import run_as_main  # noqa: E402

if __name__ == "__main__":
    turns.install_if_wanted()
    script = str(Path(__file__).resolve().parents[1] / "pretrain_let.py")
    sys.argv[0] = script
    run_as_main(script)
