"""Tokenize JSON lines into the .bin/.idx pairs that Megatron trains on.

The pairs are byte-identical with those of Megatron's own tools/preprocess_data.py. The order of
the documents is the order of the inputs, whatever the number of workers.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from megatron_let import __version__
from megatron_let.data.fingerprint import tokenizer_fingerprint
from megatron_let.data.jsonl import JsonlFile, LineBatch
from megatron_let.data.workers import map_in_order

if TYPE_CHECKING:
    from megatron.core.tokenizers.text.libraries import HuggingFaceTokenizer

TOKENIZER_TYPES = ("HuggingFaceTokenizer",)

_BATCH_LINES = 128
_BATCH_BYTES = 1024 * 1024


@dataclass(frozen=True)
class PreprocessConfig:
    """What to tokenize and where to write it; the fields are named after Megatron's flags."""

    input: tuple[str, ...]
    """.jsonl and .jsonl.zst files, read in this order."""

    output_prefix: str
    """Each key is written to PREFIX_KEY_document.bin, .idx and .json."""

    tokenizer_model: str
    """Folder or Hugging Face id of the tokenizer."""

    tokenizer_type: str = "HuggingFaceTokenizer"
    """One of TOKENIZER_TYPES."""

    tokenizer_hf_no_include_special_tokens: bool = False
    """Leave out what the tokenizer itself adds around a text, such as a BOS token."""

    json_keys: tuple[str, ...] = ("text",)
    """Keys of the JSON objects whose texts are tokenized, each into a dataset of its own."""

    append_eod: bool = False
    """End every document that is not empty with the end-of-document token."""

    workers: int = 1
    """Processes that tokenize, besides the one that reads and writes."""

    log_interval: int = 1000
    """Documents between two progress lines."""


@dataclass(frozen=True)
class EncodedBatch:
    """The documents of one `LineBatch`: per key, in order, their token ids and text sizes."""

    token_ids: dict[str, list[np.ndarray]]
    text_bytes: dict[str, int]
    documents: int
    line_bytes: int


@dataclass(frozen=True)
class Encoder:
    """Turns lines into token ids exactly as Megatron's tokenizer does, many at a time."""

    tokenizer: "HuggingFaceTokenizer"
    json_keys: tuple[str, ...]
    dtype: type[np.number]
    eod: int | None
    """Id that ends every document that is not empty; None appends nothing."""

    def encode(self, batch: LineBatch) -> EncodedBatch:
        """Parse and tokenize `batch`; raises ValueError naming file and line of a bad line."""
        rows = [
            _parse_texts(line, self.json_keys, f"{batch.path}:{number}")
            for number, line in enumerate(batch.lines, start=batch.first_line)
        ]
        columns = dict(zip(self.json_keys, zip(*rows, strict=True), strict=True))
        return EncodedBatch(
            token_ids={key: self._tokenize(list(texts)) for key, texts in columns.items()},
            text_bytes={key: sum(len(t.encode()) for t in ts) for key, ts in columns.items()},
            documents=len(batch.lines),
            line_bytes=sum(map(len, batch.lines)),
        )

    def _tokenize(self, texts: list[str]) -> list[np.ndarray]:
        # One call for all texts gives the ids that Megatron's `tokenize` gives one at a time.
        encoded = self.tokenizer.tokenizer(
            texts,
            add_special_tokens=self.tokenizer.include_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        end = [] if self.eod is None else [self.eod]
        return [np.array(ids + end if ids else [], self.dtype) for ids in encoded.input_ids]


class _Output:
    """One key's dataset, written beside its final place and moved there when complete."""

    # The index comes last: a reader opens it first, so it must not exist without the others.
    SUFFIXES = (".bin", ".json", ".idx")

    def __init__(self, prefix: str, dtype: type[np.number]) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self.prefix = prefix
        self.documents = self.empty_documents = self.tokens = self.text_bytes = 0
        self._builder = IndexedDatasetBuilder(prefix + ".bin.tmp", dtype=dtype)

    def add(self, documents: list[np.ndarray], text_bytes: int) -> None:
        for ids in documents:
            # As Megatron does, an empty document keeps its place but holds no sequence.
            self._builder.add_document(ids, [len(ids)] if len(ids) else [])
            self.empty_documents += not len(ids)
            self.tokens += len(ids)
        self.documents += len(documents)
        self.text_bytes += text_bytes

    def counts(self) -> dict[str, int]:
        return {
            "documents": self.documents,
            "empty_documents": self.empty_documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
        }

    def finish(self, sidecar: dict[str, Any]) -> None:
        if not self.tokens:
            raise ValueError(f"no text was found for {self.prefix}; check --input and --json-keys")
        self._builder.finalize(self.prefix + ".idx.tmp")
        Path(self.prefix + ".json.tmp").write_text(json.dumps(sidecar, indent=2) + "\n")

    def publish(self) -> None:
        for suffix in self.SUFFIXES:
            os.rename(self.prefix + suffix + ".tmp", self.prefix + suffix)

    def discard(self) -> None:
        self._builder.data_file.close()
        for suffix in self.SUFFIXES:
            Path(self.prefix + suffix + ".tmp").unlink(missing_ok=True)


class _Progress:
    """A line on stderr each `log_interval` documents, and a bar if somebody is watching."""

    def __init__(self, log_interval: int) -> None:
        self._log_interval = log_interval
        self._documents = self._bytes = 0
        self._start = time.monotonic()

    @cached_property
    def _bar(self) -> tqdm:
        # Made at the first update: a bar starts a thread, and the workers are forked before.
        return tqdm(unit=" documents", disable=not sys.stderr.isatty())

    def update(self, documents: int, line_bytes: int) -> None:
        before = self._documents // self._log_interval
        self._documents += documents
        self._bytes += line_bytes
        self._bar.update(documents)
        after = self._documents // self._log_interval
        if after > before:
            self._log(after * self._log_interval)

    def _log(self, documents: int) -> None:
        seconds = time.monotonic() - self._start
        rate, megabytes = self._documents / seconds, self._bytes / seconds / 1024**2
        message = f"Processed {documents} documents ({rate:.1f} docs/s, {megabytes:.2f} MB/s)."
        tqdm.write(message, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


def dataset_prefix(output_prefix: str, json_key: str) -> str:
    """Return the path, without suffix, of the dataset that `json_key` is written to."""
    return f"{output_prefix}_{json_key}_document"


@contextmanager
def _single_threaded_tokenizers() -> Iterator[None]:
    # The tokenizers library deadlocks if a forked worker uses threads its parent has started.
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


@_single_threaded_tokenizers()
def preprocess(config: PreprocessConfig) -> list[str]:
    """Tokenize `config.input`; return the path, without suffix, of each dataset written.

    Beside each .bin/.idx pair a .json file says what made it: tool version, tokenizer
    fingerprint, arguments, inputs with sizes and SHA-256, and counts. Nothing is left at the
    final paths unless everything succeeded.

    Raises:
        ValueError: for anything the caller can put right: unusable arguments or inputs, an
            output that exists, a malformed line, a tokenizer without the token asked for.
    """
    from megatron_let import cpu  # imports torch, which --help does without

    start = time.monotonic()
    cpu.quieten()
    _check(config)
    files = [JsonlFile(path) for path in config.input]
    encoder = _build_encoder(config)
    outputs: dict[str, _Output] = {}
    try:
        for key in config.json_keys:
            outputs[key] = _Output(dataset_prefix(config.output_prefix, key), encoder.dtype)
        _encode_into(outputs, files, encoder, config)
        record = _describe(config, encoder, files) | {"seconds": time.monotonic() - start}
        for output in outputs.values():
            output.finish(record | output.counts())
        for output in outputs.values():
            output.publish()
    finally:
        for output in outputs.values():
            output.discard()
    return [output.prefix for output in outputs.values()]


def load_tokenizer(model: str, include_special_tokens: bool = True) -> "HuggingFaceTokenizer":
    """Load Megatron's wrapper of the Hugging Face tokenizer at `model`, a folder or an id.

    Code that comes with a tokenizer is never run. Raises ValueError if it cannot be loaded.
    """
    # Imported here because it takes seconds, which a mistyped argument should not cost.
    from megatron.core.tokenizers.text.libraries import HuggingFaceTokenizer

    return HuggingFaceTokenizer(
        model, include_special_tokens=include_special_tokens, trust_remote_code=False
    )


def _check(config: PreprocessConfig) -> None:
    if config.tokenizer_type not in TOKENIZER_TYPES:
        raise ValueError(
            f"--tokenizer-type {config.tokenizer_type} is not supported; "
            f"use one of {', '.join(TOKENIZER_TYPES)}"
        )
    if config.workers < 1 or config.log_interval < 1:
        raise ValueError(
            f"--workers {config.workers} and --log-interval {config.log_interval} "
            "must both be at least 1"
        )
    if not config.input or not config.json_keys:
        raise ValueError("--input and --json-keys must each name at least one value")
    if len(set(config.json_keys)) < len(config.json_keys):
        raise ValueError(
            f"--json-keys {' '.join(config.json_keys)} names a key twice; name it once"
        )
    for key in config.json_keys:
        _check_output(dataset_prefix(config.output_prefix, key))


def _check_output(prefix: str) -> None:
    folder = Path(prefix).parent
    if not folder.is_dir():
        raise ValueError(f"the output folder {folder} does not exist; create it first")
    for suffix in _Output.SUFFIXES:
        if Path(prefix + suffix).exists():
            raise ValueError(
                f"output {prefix + suffix} exists already and is not overwritten; "
                "move it away or choose another --output-prefix"
            )


def _build_encoder(config: PreprocessConfig) -> Encoder:
    from megatron.core.datasets.indexed_dataset import DType

    special_tokens = not config.tokenizer_hf_no_include_special_tokens
    tokenizer = load_tokenizer(config.tokenizer_model, special_tokens)
    if config.append_eod and tokenizer.eod is None:
        raise ValueError(
            f"--append-eod needs an end-of-document token, but the tokenizer "
            f"{config.tokenizer_model} has no eos_token; set one in its tokenizer_config.json"
        )
    return Encoder(
        tokenizer=tokenizer,
        json_keys=config.json_keys,
        dtype=DType.optimal_dtype(tokenizer.vocab_size),
        eod=tokenizer.eod if config.append_eod else None,
    )


def _parse_texts(line: bytes, keys: tuple[str, ...], where: str) -> list[str]:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not a JSON object in UTF-8: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(record).__name__}")
    for key in keys:
        if key not in record:
            raise ValueError(f"{where}: no key {key!r}; check --json-keys")
        _check_text(record[key], f"{where}: the value of {key!r}")
    return [record[key] for key in keys]


def _check_text(text: object, what: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{what} must be a string, found {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not valid Unicode: {error}") from error


def _encode_into(
    outputs: dict[str, _Output], files: list[JsonlFile], encoder: Encoder, config: PreprocessConfig
) -> None:
    batches = (batch for file in files for batch in file.batches(_BATCH_LINES, _BATCH_BYTES))
    progress = _Progress(config.log_interval)
    try:
        for encoded in map_in_order(encoder.encode, batches, config.workers):
            for key, output in outputs.items():
                output.add(encoded.token_ids[key], encoded.text_bytes[key])
            progress.update(encoded.documents, encoded.line_bytes)
    finally:
        progress.close()


def _describe(config: PreprocessConfig, encoder: Encoder, files: list[JsonlFile]) -> dict[str, Any]:
    tokenizer = encoder.tokenizer
    return {
        "tool_version": __version__,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer.tokenizer.get_vocab()),
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod,
        "arguments": asdict(config),
        "inputs": [{"path": f.path, "bytes": f.size, "sha256": f.sha256} for f in files],
    }
