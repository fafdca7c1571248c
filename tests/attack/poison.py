"""Checkpoints that are programs as well: each part runs something when it is unpickled.

What is put in leaves the part as it was, so that a reader who is not on guard notices nothing.
"""

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

ENTRIES = ("common_state", "rng_state", "_extra_state")
"""What is no tensor in the data of a checkpoint."""


def poisoned_pickle(content: bytes, marker: Path) -> bytes:
    """A pickle that makes a file first, and leaves nothing of that on the unpickler's stack."""
    assert content[:1] == b"\x80"  # its protocol, two bytes
    words = b"".join(
        b"X" + len(word).to_bytes(4, "little") + word for word in (os.fsencode(marker), b"w")
    )
    return content[:2] + b"cbuiltins\nopen\n(" + words + b"tR0" + content[2:]


def poisoned_archive(content: bytes, marker: Path) -> bytes:
    """The same of what `torch.save` wrote."""
    poisoned = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(poisoned, "w") as new:
        for record in old.infolist():
            data = old.read(record)
            is_pickle = record.filename.endswith("data.pkl")
            new.writestr(record.filename, poisoned_pickle(data, marker) if is_pickle else data)
    return poisoned.getvalue()


def poison_metadata(folder: Path, markers: Path) -> None:
    """`.metadata`; its marker is called `metadata`."""
    path = folder / ".metadata"
    path.write_bytes(poisoned_pickle(path.read_bytes(), markers / "metadata"))
    _without_sums(folder)


def poison_entries(folder: Path, markers: Path, *kinds: str) -> None:
    """Entries that are no tensors; a marker is called by its kind."""
    for kind in kinds or ENTRIES:
        replace_entry(folder, kind, lambda old, kind=kind: poisoned_archive(old, markers / kind))


def change_args(folder: Path, changes: dict[str, Any], gone: tuple[str, ...] = ()) -> None:
    """Save the run's arguments as another run, or older code, would have; runs in a worker."""

    def changed(old: bytes) -> bytes:
        common = torch.load(io.BytesIO(old), weights_only=False)
        args = vars(common[0]["args"])
        args.update(changes)
        for name in gone:
            del args[name]
        new = io.BytesIO()
        torch.save(common, new)
        return new.getvalue()

    replace_entry(folder, "common_state", changed)


def replace_entry(folder: Path, kind: str, make: Callable[[bytes], bytes]) -> None:
    """Append another form of an entry to its file, and have `.metadata` name that."""
    metadata = read_metadata(folder)
    for index, stored in metadata.storage_data.items():
        if kind in index.fqn:
            with (folder / stored.relative_path).open("r+b") as file:
                file.seek(stored.offset)
                entry = make(file.read(stored.length))
                stored.offset, stored.length = file.seek(0, os.SEEK_END), len(entry)
                file.write(entry)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    _without_sums(folder)


def _without_sums(folder: Path) -> None:
    """Whoever changes a checkpoint can make sums of his own."""
    (folder / "integrity.json").unlink(missing_ok=True)


def read_metadata(folder: Path) -> Metadata:
    """A test's own, before it is poisoned."""
    return pickle.loads((folder / ".metadata").read_bytes())
