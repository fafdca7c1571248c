"""Read blocks, spread them over the workers, write what comes back, and commit it now and then."""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property

from tqdm import tqdm

from megatron_let.data.encode import BlockEncoder, EncodedBlock, dataset_name
from megatron_let.data.indexed import PairWriter
from megatron_let.data.sources import Block, InputFile, Position
from megatron_let.data.workers import map_in_order
from megatron_let.data.workplace import State, Workplace, add_counts

COMMIT_SECONDS = 1.0
"""What a killed run loses at most, besides what is under way in the workers."""

MAX_DATASETS = 400
"""That --split-by-meta may open, two files each: a process may usually have 1,024."""


class Stream:
    """One attempt at all inputs.

    Args:
        inputs: the files, in order.
        encoder: what the workers do.
        workplace: where the datasets are written.
        state: where to begin; kept up to date.
    """

    def __init__(
        self,
        inputs: Sequence[InputFile],
        encoder: BlockEncoder,
        workplace: Workplace,
        state: State,
    ) -> None:
        self._inputs, self._encoder = inputs, encoder
        self._workplace, self._state = workplace, state
        self._writers = {
            name: PairWriter(workplace.folder / name, sizes) for name, sizes in state.sizes.items()
        }
        self._skipped = open(workplace.folder / "skipped.jsonl", "ab")
        self._skipped.truncate(state.skipped_bytes)

    def run(self, workers: int, log_interval: int) -> None:
        """Write all blocks that no commit covers."""
        progress = _Progress(log_interval)
        committed = time.monotonic()
        try:
            for encoded in map_in_order(self._encoder, self._blocks(), workers):
                self._write(encoded)
                progress.update(encoded.documents, encoded.size)
                if time.monotonic() - committed > COMMIT_SECONDS:
                    self._commit()
                    committed = time.monotonic()
            self._commit(all_read=True)
        except ValueError:
            self._commit()  # a call that skips the record goes on from here
            raise
        finally:
            progress.close()
            for writer in self._writers.values():
                writer.close()
            self._skipped.close()

    def _blocks(self) -> Iterator[Block]:
        start = self._state.position
        for file in self._inputs[start.file :]:
            here = start if file.index == start.file else Position(file.index)
            yield from file.blocks(here)

    def _write(self, encoded: EncodedBlock) -> None:
        # All names first: what they can raise must not leave half a block behind.
        names = [self._dataset(part.group, part.key) for part in encoded.parts]
        for name, part in zip(names, encoded.parts, strict=True):
            lengths = part.tokens.lengths
            self._writers[name].add(part.tokens.ids, lengths)
            counts = {
                "documents": len(lengths),
                "empty_documents": int((lengths == 0).sum()),
                "tokens": len(part.tokens.ids),
                "text_bytes": part.text_bytes,
            }
            add_counts(self._state, name, counts)
        for skipped in encoded.skipped:
            kind = skipped.reason.partition(":")[0]
            self._state.skipped[kind] = self._state.skipped.get(kind, 0) + 1
            self._skipped.write(json.dumps(asdict(skipped)).encode() + b"\n")
        self._state.position = encoded.end

    def _dataset(self, group: str, key: str) -> str:
        name = dataset_name(group, key)
        if name not in self._writers:
            if len(self._writers) == MAX_DATASETS:
                raise ValueError(
                    f"--split-by-meta {self._encoder.group_key} has more than {MAX_DATASETS} "
                    f"values, such as {group!r}; choose a key with fewer"
                )
            self._writers[name] = PairWriter(self._workplace.folder / name)
        before = self._state.groups.setdefault(name, group)
        if before != group:
            raise ValueError(
                f"--split-by-meta {self._encoder.group_key} has the values {before!r} and "
                f"{group!r}, which would share the name {name}; rename one"
            )
        return name

    def _commit(self, all_read: bool = False) -> None:
        state = self._state
        finished = len(self._inputs) if all_read else state.position.file
        for file in self._inputs[len(state.inputs) : finished]:
            about = {"path": file.path, "bytes": file.size, "sha256": file.sha256}
            state.inputs.append(about)
        state.sizes = {name: writer.commit() for name, writer in self._writers.items()}
        self._skipped.flush()
        os.fsync(self._skipped.fileno())
        state.skipped_bytes = self._skipped.tell()
        self._workplace.save(state)


class _Progress:
    """A line on stderr each `log_interval` documents, and a bar if somebody is watching."""

    def __init__(self, log_interval: int) -> None:
        self._log_interval = log_interval
        self._documents = self._bytes = 0
        self._start = time.monotonic()

    @cached_property
    def _bar(self) -> tqdm:
        # Made at the first update: a bar starts a thread, and the workers are forked before.
        return tqdm(unit="B", unit_scale=True, disable=not sys.stderr.isatty())

    def update(self, documents: int, size: int) -> None:
        before = self._documents // self._log_interval
        self._documents += documents
        self._bytes += size
        self._bar.update(size)
        after = self._documents // self._log_interval
        if after > before:
            self._log(after * self._log_interval)

    def _log(self, documents: int) -> None:
        if not documents:
            return
        seconds = time.monotonic() - self._start
        rate, megabytes = self._documents / seconds, self._bytes / seconds / 1024**2
        message = f"Processed {documents} documents ({rate:.1f} docs/s, {megabytes:.2f} MB/s)."
        tqdm.write(message, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        self._log(self._documents)
