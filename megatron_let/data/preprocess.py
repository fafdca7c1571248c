"""Tokenize texts into the .bin/.idx pairs that Megatron trains on.

The pairs are byte-identical with those of Megatron's own tools/preprocess_data.py. The order of
the documents is that of the inputs, whatever the number of workers. Reading and writing happen
in `stream`; `encode` runs in the workers; `workplace` makes a killed run go on.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from megatron_let import __version__
from megatron_let.data.documents import GROUP_PARENT
from megatron_let.data.encode import BlockEncoder, EngineDiffers, dataset_name
from megatron_let.data.engines import ENGINES, Engine, Library, make_engine
from megatron_let.data.fingerprint import tokenizer_fingerprint
from megatron_let.data.indexed import token_dtype, write_index
from megatron_let.data.shuffle import shuffle_documents
from megatron_let.data.sources import InputFile, Position, expand
from megatron_let.data.stream import Stream
from megatron_let.data.tokenizer import (
    Tokenizer,
    TokenizerConfig,
    end_of_document,
    load_tokenizer,
)
from megatron_let.data.workplace import State, Workplace


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig(TokenizerConfig):
    """What to tokenize and where to write it; the fields are named after the tool's flags."""

    input: tuple[str, ...]
    """Files, folders and patterns, read in this order."""

    output_prefix: str
    """Each key is written to PREFIX_KEY_document.bin, .idx and .json."""

    json_keys: tuple[str, ...] = ("text",)
    """Keys of the JSON objects whose texts are tokenized, each into a dataset of its own."""

    split_by_meta: str | None = None
    """Key in each record's "meta" whose values get datasets of their own."""

    append_eod: bool = False
    """End every document that is not empty with the end-of-document token."""

    engine: str = "auto"
    """One of ENGINES."""

    verify_fraction: float = 0.001
    """Of the documents, the part that gigatoken's tokens are compared on."""

    on_error: Literal["stop", "skip"] = "stop"
    """What to do about a record that is no document."""

    shuffle_documents: int | None = None
    """Seed of a random order of the documents; None keeps the order of the inputs."""

    workers: int = 1
    """Processes that tokenize, besides the one that reads and writes."""

    log_interval: int = 100_000
    """Documents between two progress lines."""


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

    Beside each .bin/.idx pair a .json file says what made it. Killed and called again, it goes on
    where it was. Nothing appears at the final paths before everything has succeeded.

    Raises:
        ValueError: for anything the caller can put right: unusable arguments or inputs, an
            output that exists, a record that is no document, a tokenizer without the token asked
            for.
    """
    _check(config)
    paths = expand(config.input)
    tokenizer = load_tokenizer(config)
    ids = tokenizer.ids()
    identity = _identity(config, paths, ids)
    workplace = Workplace(config.output_prefix, identity)
    state = workplace.state
    try:
        if state is None or not state.moves:
            _check_outputs(config)
            job = _Job(config, paths, tokenizer, _fitting_dtype(tokenizer.vocab_size, ids))
            state = _tokenized(job, workplace, identity)
            job.complete(workplace, state)
        datasets = [moved for name, moved in state.moves.items() if name.endswith(".idx")]
        workplace.publish(state)
    finally:
        made = workplace.state
        workplace.close(keep=made is not None and made.position != Position())
    return [path.removesuffix(".idx") for path in datasets]


def _check(config: PreprocessConfig) -> None:
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
    if config.engine not in ENGINES:
        raise ValueError(f"--engine {config.engine} is not one of {', '.join(ENGINES)}")
    if not 0 <= config.verify_fraction <= 1:
        raise ValueError(f"--verify-fraction {config.verify_fraction} must lie between 0 and 1")
    folder = Path(config.output_prefix).parent
    if not folder.is_dir():
        raise ValueError(f"the output folder {folder} does not exist; create it first")


def _check_outputs(config: PreprocessConfig) -> None:
    for key in config.json_keys:
        prefix = f"{config.output_prefix}_{dataset_name('', key)}"
        paths = [f"{prefix}{suffix}" for suffix in (".bin", ".idx", ".json")]
        if config.split_by_meta is not None:  # its datasets are not known yet
            paths = [f"{config.output_prefix}_{key}_blend.txt"]
        for path in paths:
            if Path(path).exists():
                raise ValueError(
                    f"output {path} exists already and is not overwritten; move it away or choose "
                    "another --output-prefix"
                )


def _identity(config: PreprocessConfig, paths: list[str], ids: dict[str, int]) -> dict[str, Any]:
    stats = [os.stat(path) for path in paths]
    return {
        "tokenizer": tokenizer_fingerprint(ids),
        "input": [
            [path, stat.st_size, stat.st_mtime_ns] for path, stat in zip(paths, stats, strict=True)
        ],
        "json_keys": config.json_keys,
        "split_by_meta": config.split_by_meta,
        "append_eod": config.append_eod,
        "engine": config.engine,
        "shuffle_documents": config.shuffle_documents,
        "include_special_tokens": not config.tokenizer_hf_no_include_special_tokens,
    }


def _tokenized(job: "_Job", workplace: Workplace, identity: dict[str, Any]) -> State:
    """Tokenize everything that no earlier call has; start over should gigatoken prove wrong."""
    config, state = job.config, workplace.state
    engine = make_engine(config.engine if state is None else state.engine, job.tokenizer, _tell)
    if state is None:
        state = workplace.start(identity, engine.name)
    elif state.position != Position():
        done = sum(counts["documents"] for counts in state.counts.values())
        _tell(f"going on with {workplace.folder}: {done:,} documents are done")
    try:
        job.stream(engine, workplace, state).run(config.workers, config.log_interval)
    except EngineDiffers as error:
        workplace.clear()
        workplace.state = None
        fault = f"gigatoken gives other tokens than the tokenizer's own library for {error}"
        if config.engine == "gigatoken":
            raise ValueError(f"{fault}; use --engine auto or tokenizers") from error
        _tell(f"{fault}: starting over with the library")
        state = workplace.start(identity, job.reference.name)
        job.stream(job.reference, workplace, state).run(config.workers, config.log_interval)
    return state


class _Job:
    """What does not change between two attempts."""

    def __init__(
        self,
        config: PreprocessConfig,
        paths: list[str],
        tokenizer: Tokenizer,
        dtype: type[np.number],
    ) -> None:
        self.config, self.paths, self.tokenizer, self.dtype = config, paths, tokenizer, dtype
        self.reference = Library(tokenizer)
        name = config.tokenizer_model or str(config.vocab_file)
        self.eod = end_of_document(tokenizer, name) if config.append_eod else None

    def stream(self, engine: Engine, workplace: Workplace, state: State) -> Stream:
        """One attempt with `engine`."""
        config = self.config
        columns = [*config.json_keys, *([GROUP_PARENT] if config.split_by_meta else [])]
        encoder = BlockEncoder(
            engine=engine,
            reference=self.reference,
            verify_fraction=config.verify_fraction,
            keys=config.json_keys,
            group_key=config.split_by_meta,
            eod=self.eod,
            dtype=self.dtype,
            on_error=config.on_error,
        )
        inputs = [InputFile(path, index, columns) for index, path in enumerate(self.paths)]
        return Stream(inputs, encoder, workplace, state)

    def complete(self, workplace: Workplace, state: State) -> None:
        """Write what belongs to the tokens, and decide where everything goes."""
        empty = [name for name, counts in state.counts.items() if not counts["tokens"]]
        # One of several subsets may well be empty; the blend leaves it out.
        if len(empty) == len(state.counts) or (empty and not self.config.split_by_meta):
            raise ValueError(
                f"no text was found for {', '.join(empty) or self.config.output_prefix}; check "
                "--input and --json-keys"
            )
        record = self._record(state)
        prefix, indices = self.config.output_prefix, {}
        moves: dict[str, str] = {}
        for name, counts in state.counts.items():
            made = self._finished(workplace.folder / name)
            (workplace.folder / f"{name}.json").write_text(json.dumps(record | counts, indent=2))
            moves |= {made.name + ".bin": f"{prefix}_{name}.bin"}
            moves |= {name + ".json": f"{prefix}_{name}.json"}
            indices[made.name + ".idx"] = f"{prefix}_{name}.idx"
        # An index comes after what it speaks of, and a list of datasets after them.
        state.moves = moves | indices | self._lists(workplace.folder, state)
        workplace.save(state)

    def _finished(self, prefix: Path) -> Path:
        """Write the index; return where the finished dataset lies."""
        seed = self.config.shuffle_documents
        if seed is not None:
            prefix = shuffle_documents(prefix, self.dtype, seed)
        write_index(prefix, self.dtype)
        return prefix

    def _record(self, state: State) -> dict[str, Any]:
        return {
            "tool_version": __version__,
            "engine": state.engine,
            "tokenizer_fingerprint": state.identity["tokenizer"],
            "vocab_size": self.tokenizer.vocab_size,
            "eod_id": self.eod,
            "arguments": asdict(self.config),
            "inputs": state.inputs,
            "skipped": state.skipped,
        }

    def _lists(self, folder: Path, state: State) -> dict[str, str]:
        """The lists that lie beside the datasets, where there is something to list."""
        prefix, moves = self.config.output_prefix, {}
        if state.skipped:
            moves["skipped.jsonl"] = f"{prefix}_skipped.jsonl"
        for key in self.config.json_keys if self.config.split_by_meta else ():
            sizes = {
                name: counts["tokens"]
                for name, counts in state.counts.items()
                if name.endswith(f"_{dataset_name('', key)}") and counts["tokens"]
            }
            blend = " ".join(f"{tokens} {prefix}_{name}" for name, tokens in sizes.items())
            (folder / f"{key}_blend.txt").write_text(blend + "\n")
            moves[f"{key}_blend.txt"] = f"{prefix}_{key}_blend.txt"
        return moves


def _tell(line: str) -> None:
    tqdm.write(f"> {line}", file=sys.stderr)


def _fitting_dtype(vocab_size: int, ids: dict[str, int]) -> type[np.number]:
    """The type of the ids in the .bin file.

    Raises:
        ValueError: an id does not fit into it.
    """
    dtype, highest = token_dtype(vocab_size), max(ids.values())
    if highest > np.iinfo(dtype).max:
        raise ValueError(
            f"the tokenizer has {vocab_size} tokens but an id {highest}, which does not fit into "
            f"the {np.dtype(dtype).name} that Megatron stores for that many"
        )
    return dtype
