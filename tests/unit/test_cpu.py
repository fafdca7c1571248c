"""The redirects are tried in a process of their own, which this one must not become.

`stages` runs one after the other: Megatron as it comes, a GPU that torch claims to see, `--cpu`,
and `activate` again; each prints what every redirected name then stands for.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_let import cpu

REDIRECTS = [f"{r.owner}.{r.name}" for r in cpu.TORCH_REDIRECTS + cpu.MEGATRON_REDIRECTS]
STAGES = """
import json, sys
import torch
from megatron_let import cpu

def ids():
    values = {}
    for redirect in cpu.TORCH_REDIRECTS + cpu.MEGATRON_REDIRECTS:
        owner = cpu.resolve(redirect.owner)
        value = vars(owner).get(redirect.name, getattr(owner, redirect.name, None))
        values[f"{redirect.owner}.{redirect.name}"] = None if value is None else id(value)
    return values

def stage(name, *activate):
    if activate:
        cpu.activate_if_wanted(*activate)
    stages[name] = {"active": cpu.is_active(), "ids": ids()}

kept, stages = [], {}
stage("upstream")
kept.append([getattr(cpu.resolve(r.owner), r.name) for r in cpu.TORCH_REDIRECTS])  # ids stay taken
original, torch.cuda.is_available = torch.cuda.is_available, lambda: True
stage("gpu", ["--num-layers", "2"])
stage("gpu and --cpu", ["--cpu"])
stage("twice", ["--cpu"])
torch.cuda.is_available = original
stages["wanted without a gpu"] = cpu.wanted([])
print(json.dumps(stages))
"""


@pytest.fixture(scope="module")
def stages():
    result = subprocess.run(
        [sys.executable, "-c", STAGES],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
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


def test_without_a_gpu_the_platform_is_wanted(stages):
    assert stages["wanted without a gpu"]


# --- optional accelerators ----------------------------------------------------------------------

WITHOUT_TE = {"transformer_impl": "local", "apply_rope_fusion": False}
WITHOUT_APEX = {"no_persist_layer_norm": True, "masked_softmax_fusion": False}
WITHOUT_EXTENSIONS = {"gradient_accumulation_fusion": False}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Return a function that makes modules importable, found by their files as real ones are."""
    monkeypatch.syspath_prepend(tmp_path)
    cpu._tell_once.cache_clear()
    for module in [m for m in sys.modules if m.split(".")[0] in ("apex", "transformer_engine")]:
        monkeypatch.delitem(sys.modules, module)

    def install(*files):
        for file in files:
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    yield install
    for module in ("apex", "transformer_engine", "fused_weight_gradient_mlp_cuda"):
        sys.modules.pop(module, None)


TE = ("transformer_engine/__init__.py", "transformer_engine/pytorch/__init__.py")
APEX = ("apex/__init__.py", "apex/optimizers/__init__.py")
EXTENSIONS = ("fused_weight_gradient_mlp_cuda.py",)
PYPI_APEX = ("apex/__init__.py", "apex/scripts/__init__.py")


@pytest.mark.parametrize(
    ("installed", "changed"),
    [
        ((), WITHOUT_TE | WITHOUT_APEX | WITHOUT_EXTENSIONS),
        (PYPI_APEX, WITHOUT_TE | WITHOUT_APEX | WITHOUT_EXTENSIONS),
        (TE, WITHOUT_APEX | WITHOUT_EXTENSIONS),  # its output layer is Megatron's
        (TE + APEX, WITHOUT_EXTENSIONS),
        (APEX + EXTENSIONS, WITHOUT_TE),
        (TE + APEX + EXTENSIONS, {}),
    ],
)
def test_defaults_follow_the_installed_packages(installed, changed, packages, capsys):
    packages(*installed)
    assert cpu.platform_defaults() == changed
    cpu.platform_defaults()
    line = capsys.readouterr().out
    assert line.count("\n") == bool(changed)  # told once, and only if something is missing
    assert ("docs/install.md" in line) == bool(changed)
    assert ("Transformer Engine" in line) == (WITHOUT_TE.items() <= changed.items())


def test_an_extension_that_does_not_load_counts_as_missing(packages, tmp_path):
    packages(*TE, *APEX, *EXTENSIONS)
    (tmp_path / EXTENSIONS[0]).write_text("raise ImportError('undefined symbol')")
    assert cpu.platform_defaults() == WITHOUT_EXTENSIONS


def test_on_cpu_no_accelerator_is_used_even_if_installed(packages, monkeypatch):
    packages(*TE, *APEX, *EXTENSIONS)
    monkeypatch.setattr(cpu, "is_active", lambda: True)
    assert not any(cpu.accelerators().values())
    assert cpu.platform_defaults()["distributed_backend"] == "gloo"
