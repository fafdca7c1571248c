"""Stream the lines of .jsonl and .jsonl.zst files, hashing the raw bytes on the way."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

SUFFIXES = (".jsonl", ".jsonl.zst")

# Small, because a compressed chunk can expand to many times its size in memory.
_CHUNK_BYTES = 16 * 1024


@dataclass(frozen=True)
class LineBatch:
    """Consecutive lines of one file, without their line ends; `first_line` counts from 1."""

    path: str
    first_line: int
    lines: list[bytes]


class JsonlFile:
    """One input file, read once from front to back and never held in memory as a whole.

    `size` (bytes) and `sha256` describe the raw file, compressed if it is compressed, and are
    final when `lines` is exhausted.
    """

    def __init__(self, path: str) -> None:
        """Remember `path`; raises ValueError if it is no readable kind of input."""
        if not path.endswith(SUFFIXES):
            raise ValueError(f"input {path} must end in one of {', '.join(SUFFIXES)}")
        if not Path(path).is_file():
            raise ValueError(f"input file {path} does not exist; check --input")
        self.path = path
        self.size = 0
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Hex digest of the raw bytes read so far."""
        return self._digest.hexdigest()

    def lines(self) -> Iterator[bytes]:
        """Yield each line without its line end; raises ValueError if the file is damaged."""
        chunks = self._raw_chunks()
        if self.path.endswith(".zst"):
            chunks = self._decompressed(chunks)
        return _split_lines(chunks)

    def batches(self, max_lines: int, max_bytes: int) -> Iterator[LineBatch]:
        """Yield the lines in batches, each closed at `max_lines` or once it has `max_bytes`."""
        first, lines, held = 1, [], 0
        for line in self.lines():
            lines.append(line)
            held += len(line)
            if len(lines) == max_lines or held >= max_bytes:
                yield LineBatch(self.path, first, lines)
                first, lines, held = first + len(lines), [], 0
        if lines:
            yield LineBatch(self.path, first, lines)

    def _raw_chunks(self) -> Iterator[bytes]:
        with open(self.path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                self.size += len(chunk)
                self._digest.update(chunk)
                yield chunk

    def _decompressed(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        # The largest window allows files packed with `zstd --long`. Frames are walked by hand
        # because the library's own stream reader takes a truncated file for a complete one.
        decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        frame = None
        try:
            for chunk in chunks:
                while chunk:
                    frame = frame or decompressor.decompressobj()
                    yield frame.decompress(chunk)
                    chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        except zstandard.ZstdError as error:
            raise ValueError(f"input {self.path} is not valid zstd data: {error}") from error
        if frame is not None:
            raise ValueError(f"input {self.path} is truncated: its last zstd frame has no end")


def _split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    # Pieces of a long line are joined once, when it ends: one line may be most of the file.
    pieces: list[bytes] = []
    for chunk in chunks:
        *complete, rest = chunk.split(b"\n")
        if complete:
            yield b"".join([*pieces, complete[0]])
            yield from complete[1:]
            pieces = []
        pieces.append(rest)
    if last := b"".join(pieces):
        yield last
