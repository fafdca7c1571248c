"""Sums of real checkpoints: what Megatron verifies, and what a kill before them leaves."""

import json
import sys

import pytest

from megatron_let.checkpoint import sums
from megatron_let.checkpoint.choice import find_damage
from megatron_let.checkpoint.folder import SUMS, differing
from tests.distributed.training import records, run
from tests.support.testing import run_distributed
from tests.support.tiny_run import FLAGS, STEPS

LAYOUT = "--pipeline-model-parallel-size 2 --save-interval 4".split()


@pytest.fixture(scope="module")
def saved(corpus, tmp_path_factory):
    """Two ranks' run without any flag for sums."""
    save = tmp_path_factory.mktemp("sums") / "run"
    assert not run(2, *corpus.flags, *LAYOUT, "--save", str(save))
    return save


def files(folder):
    return {path.name for path in folder.iterdir()} - {SUMS}


def test_every_checkpoint_of_a_run_has_them(saved):
    for step in (4, STEPS):
        folder = saved / f"iter_{step:07d}"
        assert json.loads((folder / SUMS).read_text())["files"].keys() == files(folder)
        assert {name[:4] for name in files(folder) if name.endswith("distcp")} == {"__0_", "__1_"}
        assert differing(folder) is None and find_damage(folder) is None


def test_megatron_verifies_them(corpus, saved, tmp_path):
    load = ["--load", str(saved), "--ckpt-step", "4", "--verify-integrity", "--exit-interval", "6"]
    assert not run(2, *corpus.flags, *LAYOUT, *load, "--save", str(tmp_path))
    assert max(records(tmp_path, "start")) == 4
    assert (tmp_path / "iter_0000006" / SUMS).exists()


def test_without_them_a_checkpoint_is_whole(corpus, tmp_path):
    """As when a kill comes between; --verify-integrity does not refuse it."""
    folder = tmp_path / "iter_0000004"
    folder.mkdir()
    (folder / SUMS).write_text('{"files": {"__0_0.distcp": "an older attempt\'s"}}')
    save = ["--save", str(tmp_path), "--exit-interval", "4"]
    argv = [*FLAGS, *corpus.flags, *LAYOUT, *save]
    function = "tests.distributed.test_sums:train_without"
    assert run_distributed(function, 2, argv) == [None, None]
    assert not list(folder.glob("integrity*")) and find_damage(folder) is None
    load = ["--load", str(tmp_path), "--save", str(tmp_path), "--verify-integrity"]
    assert not run(2, *corpus.flags, *LAYOUT, *load)
    assert min(step for step in records(tmp_path, "start") if step) == 4


def train_without(argv):
    """In a worker: sums fail on every rank, which is no reason to end."""
    from unittest import mock

    from tests.distributed.training import train

    with mock.patch.object(sums, "sha256", lambda path: sys.maxsize // 0):
        return train(argv)
