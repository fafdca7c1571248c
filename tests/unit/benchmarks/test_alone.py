"""What a lone rank receives of the collectives that a fake group may leave undone.

Torch 2.14's own group does them; with older ones the test fails without what it tests.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from benchmarks import alone

alone.fill_scattered()
dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
given, nothing = torch.arange(8.0).view(8, 1), float("nan")
part = torch.full((2, 1), nothing)
dist.reduce_scatter_tensor(part, given, group=dist.group.WORLD)
in_place = given.clone()
dist.reduce_scatter_tensor(in_place[2:4], in_place, dist.ReduceOp.SUM, async_op=True).wait()
exchanged = torch.full((8, 1), nothing)
dist.all_to_all_single(exchanged, given)
assert torch.equal(part, given[2:4]), part
assert torch.equal(in_place, given) and torch.equal(exchanged, given)
"""


def test_a_rank_gets_its_own_part():
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
