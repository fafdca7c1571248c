"""Read blocks, spread them over the workers, write what comes back, and commit it now and then."""

import json
import sys
import time
from dataclasses import asdict
from functools import cached_property

from tqdm import tqdm

from megatron_let.data.documents import columns
from megatron_let.data.encode import BlockEncoder, EncodedBlock, PreprocessConfig, dataset_name
from megatron_let.data.engines import make_engine
from megatron_let.data.indexed import PairWriter, open_at, token_dtype
from megatron_let.data.sources import InputFile
from megatron_let.data.tokenizer import Tokenizer
from megatron_let.data.workers import map_in_order
from megatron_let.data.workplace import Workplace
from megatron_let.files import commit

COMMIT_SECONDS = 1.0
"""What a killed run loses at most, besides what is under way in the workers."""

MAX_DATASETS = 400
"""That --split-by-meta may open, two files each: a process may usually have 1,024."""


class Stream:
    """One attempt at all inputs, in order, from the state of the workplace on."""

    def __init__(
        self, config: PreprocessConfig, paths: list[str], tokenizer: Tokenizer, workplace: Workplace
    ) -> None:
        self._config, self._workplace = config, workplace
        self._state, self._folder = workplace.state, workplace.folder
        engine = make_engine(self._state.engine, tokenizer, tell)
        self._state.engine = engine.name
        eod, dtype = tokenizer.eod if config.append_eod else None, token_dtype(tokenizer.vocab_size)
        self._encoder = BlockEncoder(config, engine, eod, dtype)
        wanted, longest = columns(config.json_keys, config.split_by_meta), config.max_document_mb
        self._inputs = [InputFile(path, i, wanted, longest) for i, path in enumerate(paths)]
        self._writers = {
            name: PairWriter(self._folder / name, sizes)
            for name, sizes in self._state.sizes.items()
        }
        self._skipped = open_at(self._folder / "skipped.jsonl", self._state.skipped_bytes)

    def run(self) -> None:
        """Write all blocks that no commit covers."""
        progress = _Progress(self._config.log_interval)
        committed, start = time.monotonic(), self._state.position
        blocks = (block for file in self._inputs[start.file :] for block in file.blocks(start))
        try:
            for encoded in map_in_order(self._encoder, blocks, self._config.workers):
                self._write(encoded)
                progress.update(encoded.documents, encoded.size)
                if time.monotonic() - committed > COMMIT_SECONDS:
                    self._commit(self._state.position.file)
                    committed = time.monotonic()
            self._commit(len(self._inputs))
        except ValueError:
            self._commit(self._state.position.file)  # a call that skips the record goes on here
            raise
        finally:
            progress.close()
            for writer in self._writers.values():
                writer.close()
            self._skipped.close()

    def _write(self, encoded: EncodedBlock) -> None:
        # All names first: what they can raise must not leave half a block behind.
        names = [self._dataset(part.group, part.key) for part in encoded.parts]
        for name, part in zip(names, encoded.parts, strict=True):
            self._writers[name].add(part.ids, part.lengths)
            counts = {
                "documents": len(part.lengths),
                "empty_documents": int((part.lengths == 0).sum()),
                "tokens": len(part.ids),
                "text_bytes": part.text_bytes,
            }
            total = self._state.counts.get(name, dict.fromkeys(counts, 0))
            self._state.counts[name] = {key: total[key] + counts[key] for key in counts}
            if len(part.ids) and encoded.end.file not in self._state.with_text[-1:]:
                self._state.with_text.append(encoded.end.file)
        for skipped in encoded.skipped:
            kind = skipped.reason.partition(":")[0]
            self._state.skipped[kind] = self._state.skipped.get(kind, 0) + skipped.records
            self._skipped.write(json.dumps(asdict(skipped)).encode() + b"\n")
        self._state.position = encoded.end

    def _dataset(self, group: str, key: str) -> str:
        name = dataset_name(group, key)
        if name not in self._writers:
            if len(self._writers) == MAX_DATASETS:
                raise ValueError(
                    f"--split-by-meta {self._config.split_by_meta} has more than {MAX_DATASETS} "
                    f"values, such as {group!r}; choose a key with fewer"
                )
            self._writers[name] = PairWriter(self._folder / name)
        before = self._state.groups.setdefault(name, group)
        if before != group:
            raise ValueError(
                f"--split-by-meta {self._config.split_by_meta} has the values {before!r} and "
                f"{group!r}, which would share the name {name}; rename one"
            )
        return name

    def _commit(self, files_read: int) -> None:
        state = self._state
        for file in self._inputs[len(state.inputs) : files_read]:
            about = {"path": file.path, "bytes": file.size, "sha256": file.digest.hexdigest()}
            state.inputs.append(about)
        state.sizes = {name: writer.commit() for name, writer in self._writers.items()}
        state.skipped_bytes = commit(self._skipped)
        self._workplace.save()


def tell(line: str) -> None:
    """Print a line of the program's own, above a bar if there is one."""
    tqdm.write(f"> {line}", file=sys.stderr)


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
        lines = self._documents // self._log_interval
        self._documents += documents
        self._bytes += size
        self._bar.update(size)
        if (reached := self._documents // self._log_interval) > lines:
            self._log(reached * self._log_interval)

    def _log(self, documents: int) -> None:
        seconds = time.monotonic() - self._start
        rate, megabytes = self._documents / seconds, self._bytes / seconds / 1024**2
        message = f"Processed {documents} documents ({rate:.1f} docs/s, {megabytes:.2f} MB/s)."
        tqdm.write(message, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        if self._documents:
            self._log(self._documents)
