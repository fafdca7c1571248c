"""The inputs of preprocessing as a stream of blocks: lines, table rows or whole texts.

A block is what one worker parses and tokenizes. No file is ever held in memory as a whole, and of a
line or a text that is too long no more than that.
"""

import glob
import hashlib
import math
import os
import re
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_let.errors import UsageError

Kind = Literal["lines", "text", "rows", "damage"]

_KINDS: dict[str, Kind] = {".jsonl": "lines", ".json": "lines", ".txt": "text", ".parquet": "rows"}
_PACKED = (".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst", ".txt.gz", ".txt.zst")
SUFFIXES = (*_KINDS, *_PACKED)

# Small, because a compressed chunk can expand to many times its size in memory.
_READ_BYTES = 64 * 1024
_BLOCK_BYTES = 1024 * 1024
_BLOCK_ROWS = 512
_BATCH_BYTES = 4 * 1024**2
"""What they hold at most, but for one larger row."""
_LINE_FOR_A_TEXT = 8
"""Bytes of a line for one of a text: JSON may write six, and there are other values."""


@dataclass(frozen=True)
class Position:
    """How far the inputs have been read: all files before `file`, and `records` records of it."""

    file: int = 0
    records: int = 0


@dataclass(frozen=True)
class Block:
    """Consecutive records of one file."""

    path: str
    kind: Kind
    first: int
    """Number of its first record in the file, from 1."""
    content: np.ndarray
    """Bytes `[size]` of whole lines, of a text, of rows in Arrow's stream, or of what is wrong."""
    end: Position
    """Where the next block begins."""


def expand(inputs: Sequence[str]) -> list[str]:
    """Files that `inputs` name: a file itself, a folder's or a pattern's files in sorted order.

    A line on stderr says what is left out. Raises ValueError where a name stands for no file, for
    one of no known kind, for one twice, or for one that lies there packed as well.
    """
    paths = [path for name in inputs for path in _expand_one(name)]
    seen: dict[Any, str] = {}
    for path in paths:
        unpacked = re.sub(r"\.(gz|zst)$", "", os.path.abspath(path), flags=re.IGNORECASE)
        if (file := file_identity(path)) in seen:
            also = f" (also as {seen[file]})" * (seen[file] != path)
            raise UsageError(f"--input names {path} twice{also}; name it once")
        if unpacked in seen:
            raise UsageError(
                f"--input reads {seen[unpacked]} and {path}, by their names the same data packed "
                "and unpacked: move one of them away, or rename it"
            )
        seen |= {file: path, unpacked: path}
    return paths


def file_identity(path: str) -> tuple[int, int]:
    """What a file is, under any name."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def _expand_one(name: str) -> list[str]:
    path = Path(name)
    if path.is_dir():
        found = _own_texts(name, [f for f in _below(name) if f.lower().endswith(SUFFIXES)])
        missing = f"input folder {name} holds no {', '.join(SUFFIXES)} file"
    elif glob.has_magic(name) and not path.exists():
        found = _own_texts(name, glob.glob(name, recursive=True))
        missing = f"input pattern {name} matches no file"
    else:
        found = [name] * path.exists()
        missing = f"input file {name} does not exist"
    if not found:
        raise ValueError(f"{missing}; check --input")
    for file in found:
        if not file.lower().endswith(SUFFIXES):
            raise ValueError(f"input {file} must end in one of {', '.join(SUFFIXES)}")
    return found


def _below(folder: str) -> Iterator[str]:
    """What lies in it, in folders that links lead to as well; each of these once."""
    seen: set[tuple[int, int]] = set()
    for root, folders, files in os.walk(Path(folder), onerror=_stop, followlinks=True):
        # What is hidden comes last: it may be where a link leads to that is not.
        links = {name: os.path.islink(os.path.join(root, name)) for name in folders}
        folders[:] = [name for name in folders if not (links[name] and name.startswith("."))]
        folders.sort(key=lambda name: (name.startswith("."), links[name], name))
        if (own := file_identity(root)) in seen:  # a link may lead to where it lies
            folders.clear()
            continue
        seen.add(own)
        yield from (os.path.join(root, file) for file in files)


def _stop(error: OSError) -> None:
    name = os.path.basename(error.filename)
    if not (name.startswith(".") or name == "lost+found"):
        raise error  # else a folder that may not be read would be one without files


def _own_texts(name: str, found: Iterable[str]) -> list[str]:
    """Without the files of a folder or pattern that nobody means; a line says how many."""
    files, is_folder = sorted(file for file in found if Path(file).is_file()), Path(name).is_dir()
    first: dict[tuple[int, int], str] = {}
    unwanted: dict[str, Callable[[str], bool]] = {
        # A pattern matches what is hidden only where it says so.
        "hidden": lambda file: is_folder and "/." in f"/{Path(file).relative_to(name)}",
        "written by this tool": lambda file: _is_output(Path(file)),
        "another name of a file": lambda file: first.setdefault(file_identity(file), file) != file,
    }
    for kind, is_unwanted in unwanted.items():
        left_out = dict.fromkeys(filter(is_unwanted, files))
        files = [file for file in files if file not in left_out]
        if left_out:
            line = f"> --input {name}: left out {len(left_out)} ({kind}), such as {min(left_out)}"
            print(line, file=sys.stderr)
    return files


def _is_output(path: Path) -> bool:
    if path.name.endswith(("_skipped.jsonl", "_blend.txt")):
        return any(path.parent.glob("*.idx"))
    beside = [path.with_suffix(ending) for ending in (".bin", ".idx")]
    is_sidecar = path.suffix == ".json" and all(file.exists() for file in beside)
    return is_sidecar or any(p.suffix == ".partial" and (p / "lock").exists() for p in path.parents)


class InputFile:
    """One input, at the place `index` among them, read from front to back.

    A record with more than `max_mb` million bytes of text in one of `columns` is not read to its
    end. `size` in bytes and `digest`, a SHA-256, are final when `blocks` is exhausted.
    """

    def __init__(
        self, path: str, index: int, columns: Sequence[str], max_mb: float = math.inf
    ) -> None:
        self.path, self.index, self.columns, self.max_mb = path, index, columns, max_mb
        unpacked = path.lower().removesuffix(".gz").removesuffix(".zst")
        self.kind = _KINDS[Path(unpacked).suffix]
        self.size = 0
        self.digest = hashlib.sha256()

    def blocks(self, start: Position) -> Iterator[Block]:
        """Blocks behind `start`, where that lies in this file; ValueError if it is damaged."""
        read, before = 0, start.records if start.file == self.index else 0
        for content, records in self._contents():
            known = max(before - read, 0)
            first, read = read + known + 1, read + records
            if first > read:
                continue
            kind: Kind = self.kind
            if isinstance(content, str):
                kind, content = "damage", content.encode()
            elif kind == "rows":
                content = _streamed(content.slice(known))
            else:
                content = content.split(b"\n", known)[-1]
            place = Position(self.index, read)
            yield Block(self.path, kind, first, np.frombuffer(content, np.uint8), place)

    def _contents(self) -> Iterator[tuple[Any, int]]:
        """What the blocks of the whole file hold, and the number of their records."""
        if self.kind == "rows":
            yield from _rows(_parquet(self.path, self.columns), list(self.columns))
            deque(self._raw(), maxlen=0)  # a table is not read in the order of its bytes
            return
        is_text = self.kind == "text"
        longest = self.max_mb * (1 if is_text else _LINE_FOR_A_TEXT * len(self.columns))
        for whole in (_whole_text if is_text else _whole_lines)(self._bytes(), longest * 1e6):
            if whole is None:
                problem = f"longer than --max-document-mb {self.max_mb:g}: more than {longest:g} MB"
                yield f"{problem} without an end, not read on; split it or raise the limit", 1
            else:  # a last line may lack its end
                yield whole, 1 if is_text else whole.count(b"\n") + (not whole.endswith(b"\n"))

    def _bytes(self) -> Iterator[bytes]:
        """The decompressed bytes in pieces."""
        name = self.path.lower()
        if name.endswith(".zst"):
            import zstandard

            # The largest window allows files packed with `zstd --long`.
            unzstd = zstandard.ZstdDecompressor(max_window_size=2**31)
            return self._unpack(unzstd.decompressobj, "zstd", zstandard.ZstdError)
        if name.endswith(".gz"):
            return self._unpack(lambda: zlib.decompressobj(wbits=31), "gzip", zlib.error)
        return self._raw()

    def _raw(self) -> Iterator[bytes]:
        with open(self.path, "rb") as file:
            while chunk := file.read(_READ_BYTES):
                self.size += len(chunk)
                self.digest.update(chunk)
                yield chunk

    def _unpack(self, start_frame: Any, form: str, damaged: type[Exception]) -> Iterator[bytes]:
        # Frames are walked by hand because the libraries' own readers take a truncated file, or
        # one of several frames, for a complete one.
        frame = None
        try:
            for chunk in self._raw():
                while chunk:
                    frame = frame or start_frame()
                    yield frame.decompress(chunk)
                    chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        except damaged as error:
            raise ValueError(f"input {self.path} is not valid {form} data: {error}") from error
        if frame is not None:
            raise ValueError(f"input {self.path} is truncated: its last {form} frame has no end")


def _parquet(path: str, columns: Sequence[str]) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"input {path} needs pyarrow; install it: pip install pyarrow") from error
    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        if getattr(error, "errno", None):  # the disk's fault, not the file's
            raise
        why = " ".join(str(error).split())
        raise ValueError(f"input {path} is not a whole Parquet file: {why}") from error
    for column in columns:
        if column not in file.schema_arrow.names:
            raise ValueError(
                f"input {path} has no column {column!r} but {', '.join(file.schema_arrow.names)}; "
                "check the flag that asks for it"
            )
    return file


def _rows(table: Any, columns: list[str]) -> Iterator[tuple[Any, int]]:
    """Rows and their number; of a row group that is damaged what is wrong with it."""
    for group in range(table.num_row_groups):
        left = table.metadata.row_group(group).num_rows
        try:
            for rows in table.iter_batches(_BLOCK_ROWS, [group], columns):
                step = max(rows.num_rows * _BATCH_BYTES // max(rows.nbytes, 1), 1)
                for start in range(0, rows.num_rows, step):
                    part = rows.slice(start, step)
                    yield part, part.num_rows
                    left -= part.num_rows
        except (OSError, ValueError, NotImplementedError) as error:
            if getattr(error, "errno", None):  # the disk's fault, not the file's
                raise
            why = " ".join(str(error).split())
            place = f"number {group + 1} of {table.num_row_groups}"
            yield f"in a damaged row group: {place}, its last {left} rows: {why}", left


def _streamed(rows: Any) -> Any:
    """Their bytes and no others: a slice itself would be sent with all of its table."""
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_batch(rows)
    return sink.getvalue()


def _whole_lines(pieces: Iterator[bytes], longest: float) -> Iterator[bytes | None]:
    """Blocks of about `_BLOCK_BYTES`, the first ones smaller: all workers soon have one.

    They end where a line does. None stands for a line of more than `longest` bytes and a block.
    """
    held: list[bytes] = []  # joined once: one line may be most of the file
    size, wanted = 0, min(_READ_BYTES, _BLOCK_BYTES)
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size < wanted:
            continue
        if end := piece.rfind(b"\n") + 1:
            yield b"".join([*held[:-1], piece[:end]])
            held = [piece[end:]]
        elif size > longest + wanted:  # the lines before it are smaller than a block
            before, newline, _ = b"".join(held).rpartition(b"\n")
            if newline:
                yield before + newline
            yield None
            held = [next((p.partition(b"\n")[2] for p in pieces if b"\n" in p), b"")]
        else:
            continue
        size, wanted = len(held[0]), min(2 * wanted, _BLOCK_BYTES)
    if last := b"".join(held):
        yield last


def _whole_text(pieces: Iterator[bytes], longest: float) -> Iterator[bytes | None]:
    """All of them as one block, if any; None where that is more than `longest` bytes."""
    text = bytearray()
    for piece in pieces:
        text += piece
        if len(text) > longest:
            yield None
            text.clear()
            deque(pieces, maxlen=0)
    if text:
        yield bytes(text)
