"""Every name that is replaced exists upstream, stands in one table, and is put back."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_let.upstream.table import Redirect, applied, apply, instead

ROOT = Path(__file__).resolve().parents[3]
WALK = """
from argparse import Namespace
from collections import Counter
from megatron_let.upstream import cpu
cpu.activate()
from megatron_let.checkpoint.door import Door
from megatron_let.upstream import async_saves, dry, loop_hooks, mended, safe_loading
from pkgutil import resolve_name

args = Namespace(
    fake_process_group=False, async_save=True, rank=0, async_ckpt_cpu_priority=1,
    async_ckpt_io_priority=1,
)
tables = {
    "cpu": cpu.TORCH_REDIRECTS + cpu.MEGATRON_REDIRECTS,
    "mended": mended.REDIRECTS,
    "safe_loading": safe_loading.REDIRECTS,
    "loading": safe_loading.redirects(None, None, None),
    "async_saves": async_saves.redirects(args, None),
    "loop_hooks": loop_hooks.LoopHooks(args).redirects(),
}
every = [redirect for table in tables.values() for redirect in table]
for redirect in every:
    getattr(resolve_name(redirect.owner), redirect.name)
    assert len(redirect.reason) > 2, redirect
for redirect in dry.TORCH + dry.MEGATRON + dry.kernels(None):  # in the place of the CPU's
    getattr(resolve_name(redirect.owner), redirect.name)
twice = [name for name, n in Counter(redirect[:2] for redirect in every).items() if n > 1]
assert not twice, twice
print({name: len(table) for name, table in tables.items()})
"""


def walk(program):
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_all_replaced_names_exist_upstream_and_stand_in_one_table():
    result = walk(WALK)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "'loop_hooks': 5" in result.stdout
    # The twins: a name that upstream has no more is told, and one that stands twice.
    for fault in ("[mended.REDIRECTS[0]._replace(name='gone')]", "mended.REDIRECTS"):
        result = walk(WALK.replace('"mended": mended.', f'"fault": {fault}, "mended": mended.'))
        assert result.returncode != 0, fault


class Owner:
    """Whose name is replaced."""

    value = 1


HERE = f"{__name__}.Owner"


def plus(number):
    return Redirect(HERE, "value", lambda value: value + number, "to try it")


@pytest.fixture(autouse=True)
def _value(monkeypatch):
    monkeypatch.setattr(Owner, "value", 1)


def test_a_second_call_replaces_the_first():
    apply([plus(1)])
    apply([plus(10)])
    assert Owner.value == 11


def test_what_is_replaced_for_a_while_is_put_back():
    Owner.value = 5
    with pytest.raises(RuntimeError), applied([plus(1)]):
        assert Owner.value == 6
        raise RuntimeError
    assert Owner.value == 5


def test_a_name_that_is_not_there_cannot_be_replaced():
    with pytest.raises(AttributeError):
        apply([Redirect("os.path", "no_such_name", instead(3), "to try it")])
    assert instead(3)("anything") == 3
