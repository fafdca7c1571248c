"""One rank of a run that something befalls: `pretrain_let.py`, with points where it can be met."""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.argv[0] = str(ROOT / "pretrain_let.py")

if __name__ == "__main__":
    Path(os.environ["CHAOS_FOLDER"], f"mark-rank-{os.environ['RANK']}").write_text(str(os.getpid()))
    from megatron_let.upstream import cpu

    cpu.activate_if_wanted()  # before Megatron is imported

    from tests.chaos import points

    points.install()
    runpy.run_path(sys.argv[0], run_name="__main__")
