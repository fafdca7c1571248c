"""The redirects are tried in a process of their own, which this one must not become.

`stages` runs one after the other: Megatron as it comes, a GPU that torch claims to see, `--cpu`,
and `activate` again; each prints what every redirected name then stands for.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_let.upstream import cpu

REDIRECTS = [f"{r.owner}.{r.name}" for r in cpu.TORCH_REDIRECTS + cpu.MEGATRON_REDIRECTS]
STAGES = """
import json, sys
import torch
from megatron_let.upstream import cpu
from pkgutil import resolve_name

def ids():
    values = {}
    for redirect in cpu.TORCH_REDIRECTS + cpu.MEGATRON_REDIRECTS:
        owner = resolve_name(redirect.owner)
        value = vars(owner).get(redirect.name, getattr(owner, redirect.name, None))
        values[f"{redirect.owner}.{redirect.name}"] = None if value is None else id(value)
    return values

def stage(name, *activate):
    if activate:
        cpu.activate_if_wanted(*activate)
    stages[name] = {"active": cpu.is_active(), "ids": ids()}

kept, stages = [], {}
stage("upstream")
kept.append([getattr(resolve_name(r.owner), r.name) for r in cpu.TORCH_REDIRECTS])  # ids stay taken
torch.cuda.is_available = lambda: True
stage("gpu", ["--num-layers", "2"])
stage("gpu and --cpu", ["--cpu"])
stage("twice", ["--cpu"])
print(json.dumps(stages))
"""


@pytest.fixture(scope="module")
def stages():
    result = subprocess.run(
        [sys.executable, "-c", STAGES],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[3],
        env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", REDIRECTS)
def test_redirected_name_exists_upstream(name, stages):
    assert stages["upstream"]["ids"][name] is not None


def test_no_name_is_redirected_twice():
    assert len(set(REDIRECTS)) == len(REDIRECTS)


def test_every_redirect_states_its_reason():
    assert all(redirect.reason for redirect in cpu.TORCH_REDIRECTS + cpu.MEGATRON_REDIRECTS)


def test_with_a_gpu_nothing_is_redirected(stages):
    assert not stages["gpu"]["active"]
    assert stages["gpu"]["ids"] == stages["upstream"]["ids"]


def test_the_flag_redirects_every_name_although_there_is_a_gpu(stages):
    assert stages["gpu and --cpu"]["active"]
    before, after = stages["upstream"]["ids"], stages["gpu and --cpu"]["ids"]
    assert [name for name in REDIRECTS if before[name] == after[name]] == []


def test_a_second_activation_does_nothing(stages):
    assert stages["twice"] == stages["gpu and --cpu"]
