"""What is wrong with a checkpoint, and which one a run goes on from instead."""

import errno
import hashlib
import pickle
import re
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.validation import save_integrity_manifest

from megatron_let.checkpoint import door as door_module
from megatron_let.checkpoint.choice import find_damage, mend
from megatron_let.checkpoint.door import Door
from megatron_let.errors import UsageError
from megatron_let.upstream.safe_loading import DamagedCheckpoint
from tests.unit.conftest import MadeCheckpoint

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture
def save(made: MadeCheckpoint) -> Path:  # noqa: F811
    """Three checkpoints with sums, the tracker on the last."""
    first = made.save / "iter_0000007"
    save_integrity_manifest(str(first))
    for step in (8, 9):
        shutil.copytree(first, made.save / f"iter_{step:07d}")
    (made.save / TRACKER).write_text("9")
    return made.save


def settle(folder: Path, step: int | None = None, own: bool = True, **flags: object) -> Path | None:
    """Choose as a run does, and mend as one does that has loaded it; returns what is loaded."""
    args = Namespace(
        **dict.fromkeys(
            "pretrained_checkpoint non_persistent_ckpt_type non_persistent_global_ckpt_dir "
            "finetune override_ckpt_iteration exit_on_missing_checkpoint verify_integrity "
            "skip_train".split()
        )
    )
    vars(args).update(
        {"load": str(folder), "save": str(folder) if own else None, "ckpt_step": step}
    )
    vars(args).update(flags)
    args.fake_process_group = True  # alone
    door = Door()
    door.settle(args)
    if door.chosen is not None:
        mend(args, door.chosen, door._damaged)
    return door.chosen


class Hooks:
    """Notes what it is told."""

    def __init__(self):
        self.told = []

    def on_load(self, saved):
        self.told.append(saved)


def test_listeners_get_the_state_of_the_checkpoint_that_is_loaded(monkeypatch):
    """Not of the newer one, which the load itself finds damaged."""
    door = Door()
    monkeypatch.setattr(door_module, "get_args", lambda: args)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    args = Namespace(finetune=False)
    hooks = Hooks()
    door.tell(hooks.on_load)
    door._args, door.chosen = args, Path("iter_0000008")
    monkeypatch.setattr(door, "settle", lambda args: setattr(door, "chosen", Path("iter_0000004")))
    monkeypatch.setattr(door, "saved_args", lambda args: Namespace(step=door.chosen.name))

    def load():
        if door.chosen.name == "iter_0000008":
            raise DamagedCheckpoint("torn")
        return 4, 0

    assert door._load(load) == (4, 0)
    assert hooks.told == [Namespace(step="iter_0000004")]


def data(save: Path, step: int) -> Path:
    [file] = (save / f"iter_{step:07d}").glob("*.distcp")
    return file


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path) -> None:
    """One bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


DAMAGE = {
    "cut": (cut, r"__0_0.distcp has \d+ of \d+ bytes"),
    "metadata flipped": (lambda file: flip(file.parent / ".metadata"), "cannot be read"),
    "flipped": (flip, "the SHA-256 of __0_0.distcp is not what it was"),
    "removed": (Path.unlink, "__0_0.distcp is missing"),
    "no metadata": (lambda file: (file.parent / ".metadata").unlink(), "cannot be read"),
    "half-written": (lambda file: (file.parent / "metadata.json").unlink(), "half-written"),
    "metadata cut": (lambda file: cut(file.parent / ".metadata"), "cannot be read"),
    "sums flipped": (lambda file: cut(file.parent / "integrity.json"), "is no list of sums"),
    "gone": (lambda file: shutil.rmtree(file.parent), "is not there"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_stepped_over(
    save: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = DAMAGE[kind]
    assert find_damage(save / "iter_0000009") is None
    damage(data(save, 9))
    with pytest.raises(UsageError, match=f"({message}|no checkpoint of step 9).*--ckpt-step"):
        settle(save, None, own=False)  # another run's: not touched
    with pytest.raises(UsageError, match=f"{message}|no checkpoint of step 9"):  # asked for by name
        settle(save, 9)
    settle(save, None, own=True)
    assert (save / TRACKER).read_text() == "8"
    folders = {path.name for path in save.iterdir() if path.is_dir()}
    kept = {"damaged_iter_0000009"} if kind != "gone" else set()
    assert folders == {"iter_0000007", "iter_0000008"} | kept
    assert "going on from" in capsys.readouterr().out
    settle(save, None, own=True)  # all is well now
    assert not capsys.readouterr().out


def test_a_flipped_bit_is_not_seen_without_sums(save: Path) -> None:
    """Twin: the sums are what finds it."""
    flip(data(save, 9))
    assert settle(save) == save / "iter_0000008"
    flip(data(save, 8))
    (save / "iter_0000008" / "integrity.json").unlink()
    assert settle(save) == save / "iter_0000008"


WITHOUT_SUMS = {
    "cut": (cut, r"__0_0.distcp has \d+ of \d+ bytes"),
    "removed": (Path.unlink, "__0_0.distcp is missing"),
    "no metadata": (lambda file: (file.parent / ".metadata").unlink(), "cannot be read"),
    "metadata cut": (lambda file: cut(file.parent / ".metadata"), "cannot be read"),
}


@pytest.mark.parametrize("kind", WITHOUT_SUMS)
def test_damage_that_sizes_tell(save: Path, kind: str) -> None:
    damage, message = WITHOUT_SUMS[kind]
    (save / "iter_0000009" / "integrity.json").unlink()
    damage(data(save, 9))
    found = find_damage(save / "iter_0000009")
    assert found is not None and re.search(message, found)


def test_a_file_that_cannot_be_read_now_is_no_damage(
    save: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost mount must not put every checkpoint aside."""

    def fail(*args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(hashlib, "file_digest", fail)
    with pytest.raises(UsageError, match="cannot be read now: .*Input/output error"):
        settle(save, None, own=True)
    assert len(list(save.glob("iter_*"))) == 3


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_nor_where_there_are_no_sums(
    save: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (save / "iter_0000009" / "integrity.json").unlink()
    right = Path.open

    def fail(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == name:
            raise OSError(errno.EIO, "Input/output error")
        return right(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(UsageError, match="iter_0000009 cannot be read now: .*Input/output error"):
        settle(save)
    assert len(list(save.glob("iter_*"))) == 3


def test_two_damaged_ones_and_a_torn_tracker(save: Path) -> None:
    cut(data(save, 9))
    flip(data(save, 8))
    (save / TRACKER).write_text("")  # Megatron was killed between opening and writing it
    settle(save, None, own=True)
    assert (save / TRACKER).read_text() == "7"
    assert (save / "damaged_iter_0000008").is_dir()
    cut(data(save, 7))
    with pytest.raises(UsageError, match="holds no whole checkpoint.*another --save"):
        settle(save, None, own=True)
    assert (save / "iter_0000007").is_dir()  # nothing is put aside where nothing is won


def test_names_of_damaged_ones_do_not_collide(save: Path) -> None:
    for _ in range(2):
        shutil.copytree(save / "iter_0000008", save / "iter_0000009", dirs_exist_ok=True)
        (save / TRACKER).write_text("9")
        cut(data(save, 9))
        settle(save, None, own=True)
    assert len(list(save.glob("damaged_iter_0000009*"))) == 2


# --- which one ---------------------------------------------------------------------------------


def name_of(path: Path | None) -> str | None:
    return path and path.name


def track(save: Path, word: str | None) -> None:
    (save / TRACKER).unlink() if word is None else (save / TRACKER).write_text(word)


TRACKED = {"gone": None, "torn": "", "no number": "9x", "missing": "12", "lower": "7"}


@pytest.mark.parametrize("kind", TRACKED)
def test_the_folders_decide_and_the_tracker_is_mended(
    save: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    word = TRACKED[kind]
    track(save, word)
    if kind == "missing":  # for the owner to say which one
        with pytest.raises(UsageError, match="no checkpoint of step 12 .*0007, iter_0000008, iter"):
            settle(save, own=False)
    else:  # nothing is written into another run's
        assert name_of(settle(save, own=False)) == "iter_0000009"
        assert (save / TRACKER).exists() == (word is not None)
    assert name_of(settle(save)) == "iter_0000009"
    assert (save / TRACKER).read_text() == "9"
    printed = capsys.readouterr().out
    assert (
        f"{TRACKER} does not name the newest whole checkpoint\n> going on from {save}/iter_0000009"
        in printed
    )
    settle(save)
    assert not capsys.readouterr().out


def test_steps_are_numbers_and_only_megatrons_names_count(save: Path) -> None:
    mine = ["iter_20000000.mine", "iter_20000000x", "iter_020000000", "iter_\u0662" + "0" * 7]
    mine.append("iter_010000000")  # a number that another folder has by its right name
    for name in ("iter_10000000", "iter_9999999", *mine):
        shutil.copytree(save / "iter_0000009", save / name)
    mine.append("iter_0000010")
    (save / mine[-1]).write_text("a file")
    track(save, None)
    assert name_of(settle(save)) == "iter_10000000"
    cut(data(save, 10_000_000))
    assert name_of(settle(save)) == "iter_9999999"
    assert all((save / name).exists() for name in mine)


def test_a_save_that_was_killed_is_no_damage(
    save: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no metadata.json yet, which is written last, before the tracker."""
    (save / "iter_0000009" / "metadata.json").unlink()
    track(save, "8")
    assert name_of(settle(save)) == "iter_0000008"
    assert not capsys.readouterr().out
    for step in (7, 8):
        (save / f"iter_{step:07d}" / "metadata.json").unlink()
    track(save, None)
    assert settle(save) is None  # killed in its first save: nothing is lost
    assert len(list(save.glob("iter_*"))) == 3


def test_a_run_without_a_checkpoint(save: Path, tmp_path: Path) -> None:
    """`--load` and `--save` of one name start from scratch; every script passes both."""
    assert settle(tmp_path / "new") is None
    with pytest.raises(UsageError, match="No checkpoint in .*new: give the folder"):
        settle(tmp_path / "new", own=False)
    with pytest.raises(UsageError, match="No checkpoint in .*new"):
        settle(tmp_path / "new", exit_on_missing_checkpoint=True)
    with pytest.raises(UsageError, match="not an iter_ folder inside it"):
        settle(save / "iter_0000009", own=False)
    pretrained = {"pretrained_checkpoint": str(save)}
    for own in (True, False):
        assert name_of(settle(tmp_path / "new", own=own, **pretrained)) == "iter_0000009"
    shutil.copytree(save, tmp_path / "run")
    track(tmp_path / "run", None)  # or Megatron would start over whole checkpoints
    assert settle(tmp_path / "run", **pretrained) == tmp_path / "run" / "iter_0000009"


def test_nothing_whole_is_overwritten(save: Path, tmp_path: Path) -> None:
    def refused(**flags: object) -> None:
        with pytest.raises(UsageError, match=r"would overwrite .*iter_0000009 in --save.*--load"):
            settle(save, **flags)

    refused(load=None)
    refused(finetune=True)
    refused(step=8)
    refused(override_ckpt_iteration=3)
    refused(load=str(tmp_path / "none"), pretrained_checkpoint=str(save))
    assert name_of(settle(save, step=9)) == "iter_0000009"
    assert name_of(settle(save, step=8, save=str(tmp_path / "other"))) == "iter_0000008"
    assert settle(save, load=None, skip_train=True) is None  # it saves nothing
    (tmp_path / "link").symlink_to(save)
    cut(data(save, 9))
    assert name_of(settle(save, load=str(tmp_path / "link"))) == "iter_0000008"


def test_a_step_that_is_not_there_is_refused_with_those_that_are(save: Path) -> None:
    for step in (5, 0):
        with pytest.raises(UsageError, match=f"of step {step} in .*iter_0000007, iter_0000008"):
            settle(save, step)


def test_another_format_is_refused_and_left_alone(save: Path) -> None:
    shutil.rmtree(save / "iter_0000009")
    (save / "iter_0000009" / "mp_rank_00").mkdir(parents=True)
    with pytest.raises(UsageError, match="--ckpt-format torch; only torch_dist .*convert"):
        settle(save)
    assert (save / "iter_0000009").is_dir()


def test_a_non_persistent_one_counts_where_it_is_asked_for(save: Path) -> None:
    flags = {"non_persistent_ckpt_type": "global"}
    aside = save / "non_persistent"
    shutil.copytree(save / "iter_0000009", aside / "iter_0000009")
    shutil.copytree(save / "iter_0000009", aside / "iter_0000012")
    assert settle(save) == save / "iter_0000009"
    assert settle(save, load=f"{save}/", **flags) == aside / "iter_0000012"
    cut(next((aside / "iter_0000012").glob("*.distcp")))
    assert settle(save, **flags) == aside / "iter_0000009"
    assert (aside / "damaged_iter_0000012").is_dir() and (save / TRACKER).read_text() == "9"


def test_a_checkpoint_without_sums_is_not_blessed(
    save: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sums = save / "iter_0000009" / "integrity.json"
    sums.unlink()
    for own in (True, False):
        settle(save, own=own, verify_integrity=True)
        assert "iter_0000009 has no sums: nobody can vouch" in capsys.readouterr().out
    assert not sums.exists()


def test_a_file_outside_the_folder_is_not_read(save: Path) -> None:
    folder = save / "iter_0000009"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for stored in metadata.storage_data.values():
        stored.relative_path = f"../iter_0000008/{stored.relative_path}"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "integrity.json").unlink()
    found = find_damage(folder)
    assert found is not None and "no place in a file here: ../iter_0000008" in found
