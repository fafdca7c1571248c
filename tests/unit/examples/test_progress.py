"""A training run that another program waits for."""

import subprocess
import sys
import time

import psutil
import pytest

WAITING = """
import sys
from pathlib import Path
from megatron_let.quickstart.run import _run_with_progress

lasting = [sys.executable, "-c", "import time; time.sleep(60)"]
_run_with_progress(lasting, Path(sys.argv[1]), 1)
"""


@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_it_does_not_outlive_who_waits_for_it(tmp_path, how):
    with subprocess.Popen([sys.executable, "-c", WAITING, str(tmp_path)]) as waiting:
        process = psutil.Process(waiting.pid)
        while not (runs := process.children()) and waiting.poll() is None:
            time.sleep(0.01)
        getattr(process, how)()
    gone, _ = psutil.wait_procs(runs, timeout=5)
    assert len(gone) == len(runs) == 1
