"""What is wrong with a checkpoint, and which one a run goes on from instead."""

import errno
import re
import shutil
from pathlib import Path

import pytest
from megatron.core.dist_checkpointing.validation import save_integrity_manifest

from megatron_let import checkpoints
from megatron_let.checkpoints import _settle, find_damage
from megatron_let.errors import UsageError
from tests.unit.conversion.conftest import MadeCheckpoint, made  # noqa: F401

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
    "cut": (cut, "the SHA-256 of __0_0.distcp is not what it was"),
    "metadata flipped": (
        lambda file: flip(file.parent / ".metadata"),
        r"the SHA-256 of \.metadata is not",
    ),
    "flipped": (flip, "the SHA-256 of __0_0.distcp is not what it was"),
    "removed": (Path.unlink, "SHA-256 of __0_0.distcp is not"),
    "no metadata": (lambda file: (file.parent / ".metadata").unlink(), r"SHA-256 of \.metadata"),
    "half-written": (lambda file: (file.parent / "metadata.json").unlink(), "half-written"),
    "metadata cut": (lambda file: cut(file.parent / ".metadata"), r"SHA-256 of \.metadata"),
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
    with pytest.raises(UsageError, match=f"{message}.*--ckpt-step"):  # another run's: not touched
        _settle(save, None, own=False)
    with pytest.raises(UsageError, match=message):  # asked for by name
        _settle(save, 9, own=True)
    _settle(save, None, own=True)
    assert (save / TRACKER).read_text() == "8"
    folders = {path.name for path in save.iterdir() if path.is_dir()}
    kept = {"damaged_iter_0000009"} if kind != "gone" else set()
    assert folders == {"iter_0000007", "iter_0000008"} | kept
    assert "going on from" in capsys.readouterr().out
    _settle(save, None, own=True)  # all is well now
    assert not capsys.readouterr().out


def test_a_flipped_bit_is_not_seen_without_sums(save: Path) -> None:
    """Twin: the sums are what finds it."""
    flip(data(save, 9))
    (save / "iter_0000009" / "integrity.json").unlink()
    assert find_damage(save / "iter_0000009") is None


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

    monkeypatch.setattr(checkpoints.hashlib, "file_digest", fail)
    with pytest.raises(UsageError, match="cannot be read now: .*Input/output error"):
        _settle(save, None, own=True)
    assert len(list(save.glob("iter_*"))) == 3


def test_two_damaged_ones_and_a_torn_tracker(save: Path) -> None:
    cut(data(save, 9))
    flip(data(save, 8))
    (save / TRACKER).write_text("")  # Megatron was killed between opening and writing it
    _settle(save, None, own=True)
    assert (save / TRACKER).read_text() == "7"
    assert (save / "damaged_iter_0000008").is_dir()
    cut(data(save, 7))
    with pytest.raises(UsageError, match="holds no whole checkpoint.*another --save"):
        _settle(save, None, own=True)
    assert (save / "iter_0000007").is_dir()  # nothing is put aside where nothing is won


def test_names_of_damaged_ones_do_not_collide(save: Path) -> None:
    for _ in range(2):
        shutil.copytree(save / "iter_0000008", save / "iter_0000009", dirs_exist_ok=True)
        (save / TRACKER).write_text("9")
        cut(data(save, 9))
        _settle(save, None, own=True)
    assert len(list(save.glob("damaged_iter_0000009*"))) == 2
