"""What is switched off follows the packages that are there."""

import sys

import pytest

from megatron_let.upstream import accelerators, cpu

WITHOUT_TE = {"transformer_impl": "local", "apply_rope_fusion": False}
WITHOUT_APEX = {"no_persist_layer_norm": True, "masked_softmax_fusion": False}
WITHOUT_EXTENSIONS = {"gradient_accumulation_fusion": False}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Return a function that makes modules importable, found by their files as real ones are."""
    monkeypatch.syspath_prepend(tmp_path)
    accelerators._tell_once.cache_clear()
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
    assert accelerators.platform_defaults() == changed
    accelerators.platform_defaults()
    line = capsys.readouterr().out
    assert line.count("\n") == bool(changed)  # told once, and only if something is missing
    assert ("docs/install.md" in line) == bool(changed)
    assert ("Transformer Engine" in line) == (WITHOUT_TE.items() <= changed.items())


def test_an_extension_that_does_not_load_counts_as_missing(packages, tmp_path):
    packages(*TE, *APEX, *EXTENSIONS)
    (tmp_path / EXTENSIONS[0]).write_text("raise ImportError('undefined symbol')")
    assert accelerators.platform_defaults() == WITHOUT_EXTENSIONS


def test_on_cpu_no_accelerator_is_used_even_if_installed(packages, monkeypatch, capsys):
    packages(*TE, *APEX, *EXTENSIONS)
    monkeypatch.setattr(cpu, "is_active", lambda: True)
    assert not any(accelerators.accelerators().values())
    assert accelerators.platform_defaults()["distributed_backend"] == "gloo"
    assert not capsys.readouterr().out  # it is the CPU, no missing package
