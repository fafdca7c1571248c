import os
from argparse import Namespace

import pytest
import torch
import torch.distributed.checkpoint

from megatron_let.checkpoint.folder import TRACKER
from megatron_let.checkpoint.retention import Retention, superfluous


def make(save, *steps, tracked):
    for step in steps:
        folder = save / f"iter_{step:07d}"
        folder.mkdir(parents=True)
        torch.distributed.checkpoint.save(
            {"weights": torch.zeros(8)}, checkpoint_id=folder, no_dist=True
        )
        (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (save / TRACKER).write_text(str(tracked))


def names(save):
    return sorted(path.name for path in save.iterdir() if path.is_dir())


def steps(paths):
    return [int(path.name[-7:]) for path in paths]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "gone"),
    [
        (1, None, [100, 200, 300, 400]),
        (2, None, [100, 200, 300]),
        (2, 200, [100, 300]),
        (5, None, []),
        (9, 100, []),
    ],
)
def test_what_goes(tmp_path, keep_last, keep_every, gone):
    make(tmp_path, 100, 200, 300, 400, 500, tracked=500)
    assert steps(superfluous(tmp_path, 500, keep_last, keep_every)) == gone


def test_what_is_no_complete_checkpoint_of_this_run_stays(tmp_path):
    make(tmp_path, 100, 200, 300, 400, tracked=300)  # 400 is being written, or was left behind
    (tmp_path / "damaged_iter_0000050").mkdir()
    (tmp_path / "release").mkdir()
    (tmp_path / "iter_0000010").symlink_to(tmp_path / "release")
    assert steps(superfluous(tmp_path, 300, 1, None)) == [100, 200]


def test_a_half_written_one_does_not_count(tmp_path):
    make(tmp_path, 100, 200, 300, 400, tracked=400)
    (tmp_path / "iter_0000300" / "metadata.json").unlink()
    assert steps(superfluous(tmp_path, 400, 2, None)) == [100]
    os.truncate(next((tmp_path / "iter_0000200").glob("*.distcp")), 10)
    assert steps(superfluous(tmp_path, 400, 2, None)) == []


def retention(save, keep_last=1):
    return Retention(Namespace(save=str(save), save_keep_last=keep_last, save_keep_every=None))


def saved(it, save, step):
    """Tell of a save, and wait for what it makes superfluous to be gone."""
    it.after_save(save / f"iter_{step:07d}")
    it._pool.submit(int).result()


def test_nothing_goes_before_this_start_has_saved(tmp_path):
    """It may have gone back to the oldest: --ckpt-step."""
    make(tmp_path, 1, 2, 3, tracked=3)
    retention(tmp_path).on_end(is_complete=True)
    assert names(tmp_path) == ["iter_0000001", "iter_0000002", "iter_0000003"]
    it = retention(tmp_path)
    it.after_save(tmp_path / "iter_0000002")
    it.on_end(is_complete=True)
    assert names(tmp_path) == ["iter_0000002", "iter_0000003"]


def test_what_cannot_be_removed_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    def fail(*paths):
        raise PermissionError(13, "Permission denied", str(paths[0]))

    make(tmp_path, 1, 2, tracked=2)
    monkeypatch.setattr(os, "replace", fail)
    saved(retention(tmp_path), tmp_path, 2)
    assert "> --save-keep-last: [Errno 13]" in capsys.readouterr().out
    assert names(tmp_path) == ["iter_0000001", "iter_0000002"]


def test_it_is_removed_once_a_newer_one_is_complete(tmp_path):
    it = retention(tmp_path, keep_last=2)
    make(tmp_path, 1, 2, 3, tracked=2)
    (tmp_path / "removing_iter_0000000").mkdir()  # an earlier start was killed over it
    saved(it, tmp_path, 2)
    assert names(tmp_path) == ["iter_0000001", "iter_0000002", "iter_0000003"]
    saved(it, tmp_path, 3)
    assert names(tmp_path) == ["iter_0000002", "iter_0000003"]


@pytest.mark.parametrize(("keep_last", "rank"), [(None, "0"), (1, "1")])
def test_nothing_goes_without_the_flag_or_on_another_rank(tmp_path, monkeypatch, keep_last, rank):
    monkeypatch.setenv("RANK", rank)
    make(tmp_path, 1, 2, 3, tracked=3)
    it = retention(tmp_path, keep_last)
    saved(it, tmp_path, 2)
    it.on_end(is_complete=True)
    assert names(tmp_path) == ["iter_0000001", "iter_0000002", "iter_0000003"]
