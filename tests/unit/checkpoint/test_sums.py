"""Sums made in the background: Megatron's format, each rank its own files, nothing in the way."""

import hashlib
import json
import threading

import pytest

from megatron_let.checkpoint import sums
from megatron_let.checkpoint.folder import SUMS, differing
from megatron_let.upstream.loop_hooks import Save


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of two ranks, as far as sums are concerned."""
    folder = tmp_path / "iter_0000002"
    folder.mkdir()
    for name in (".metadata", "metadata.json", "__0_0.distcp", "__0_1.distcp", "model__1_0.distcp"):
        (folder / name).write_bytes(name.encode() * 1000)
    return folder


def sum_as(rank, folder, ranks=2, before=None):
    thread = threading.Thread(target=sums._sum_after, args=(before, folder, rank, ranks))
    thread.start()
    return thread


def listed(folder):
    return json.loads((folder / SUMS).read_text())


def expected(folder):
    files = sorted(path for path in folder.iterdir() if path.name != SUMS)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_each_rank_sums_its_own_files(folder, monkeypatch, order):
    summed = []
    monkeypatch.setattr(sums, "sha256", lambda path: summed.append(path.name) or path.name[:3])
    threads = [sum_as(rank, folder) for rank in order]
    for thread in threads:
        thread.join(10)
    names = {path.name for path in folder.iterdir() if path.name != SUMS}
    assert listed(folder) == {"algorithm": "sha256", "files": {name: name[:3] for name in names}}
    assert sorted(summed) == sorted(names) and len(names) == 5  # each once; no part is left


def test_the_sums_are_right(folder):
    (folder / "__7_0.distcp").write_bytes(b"of an attempt with more ranks")
    sum_as(0, folder, ranks=1).join(10)
    assert listed(folder)["files"] == expected(folder)
    assert SUMS not in listed(folder)["files"]


def test_another_attempts_sums_do_not_stay(folder):
    (folder / SUMS).write_text('{"files": {"__0_0.distcp": "old"}}')
    (folder / sums.PARTS.format(1)).write_text('{"__0_0.distcp": "old"}')
    assert "SHA-256" in differing(folder)
    sums.Sums().before_save(Save(1, [], None, folder))
    assert differing(folder) is None
    assert not list(folder.glob("*.part"))


def test_a_rank_that_does_not_come(folder, monkeypatch, capsys):
    monkeypatch.setattr(sums, "PATIENCE_SECONDS", 0.2)
    sum_as(0, folder).join(10)
    assert "stays without sums: no integrity_1.part came" in capsys.readouterr().out
    assert not (folder / SUMS).exists()


def test_a_checkpoint_that_is_removed_meanwhile(folder, tmp_path, capsys):
    thread = sum_as(0, folder)
    folder.rename(tmp_path / "removing")
    thread.join(10)
    assert not folder.exists() and "stays without sums" in capsys.readouterr().out


def test_an_error_is_told_and_the_next_is_summed(folder, monkeypatch, capsys):
    good = sums.sha256
    monkeypatch.setattr(sums, "sha256", lambda path: 1 / 0)
    failed = sum_as(0, folder, ranks=1)
    failed.join(10)
    assert "stays without sums: division by zero" in capsys.readouterr().out
    monkeypatch.setattr(sums, "sha256", good)
    sum_as(0, folder, ranks=1, before=failed).join(10)
    assert listed(folder)["files"] == expected(folder)
