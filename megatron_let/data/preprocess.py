"""Tokenize texts into the .bin/.idx pairs that Megatron trains on.

The pairs are byte-identical with those of Megatron's own tools/preprocess_data.py. The order of
the documents is that of the inputs, whatever the number of workers. Reading and writing happen
in `stream`; `encode` runs in the workers; `workplace` makes a killed run go on.
"""

import json
import os
import sys
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from megatron_let import __version__
from megatron_let.data.documents import columns
from megatron_let.data.encode import BlockEncoder, EngineDiffers, dataset_name
from megatron_let.data.engines import ENGINES, make_engine
from megatron_let.data.fingerprint import tokenizer_fingerprint
from megatron_let.data.indexed import ENDINGS, check_absent, token_dtype, write_index
from megatron_let.data.sources import InputFile, expand
from megatron_let.data.stream import Stream
from megatron_let.data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer
from megatron_let.data.workplace import Workplace


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
    max_document_mb: float = 12
    """Million bytes of text that a document may have: tokenizing takes many times its memory."""
    workers: int = 1
    """Processes that tokenize, besides the one that reads and writes."""
    log_interval: int = 100_000
    """Documents between two progress lines."""


def preprocess(config: PreprocessConfig) -> list[str]:
    """Tokenize `config.input`; return the path, without suffix, of each dataset written.

    Beside each .bin/.idx pair a .json file says what made it. Killed and called again, it goes on
    where it was. Nothing appears at the final paths before everything has succeeded. Raises
    ValueError for anything the caller can put right, as docs/data.md lists it.
    """
    _check(config)
    paths = expand(config.input)
    tokenizer = load_tokenizer(config)
    ids = tokenizer.ids()
    identity = _identity(config, paths, ids)
    with closing(Workplace(config.output_prefix, identity, config.engine)) as workplace:
        if not workplace.state.moves:
            check_absent(_known_outputs(config))
            _check_tokenizer(config, tokenizer, ids)
            dtype = token_dtype(tokenizer.vocab_size)
            eod = tokenizer.eod if config.append_eod else None
            job = _Job(config, paths, tokenizer, dtype, eod, workplace)
            job.tokenize()
            job.complete()
        workplace.publish()
    written = workplace.state.moves.values()
    return [path.removesuffix(".idx") for path in written if path.endswith(".idx")]


def _check(config: PreprocessConfig) -> None:
    if config.workers < 1 or config.log_interval < 1:
        raise ValueError(
            f"--workers {config.workers} and --log-interval {config.log_interval} "
            "must both be at least 1"
        )
    if not config.input or not config.json_keys:
        raise ValueError("--input and --json-keys must each name at least one value")
    keys = config.json_keys
    if len(set(keys)) < len(keys):
        raise ValueError(f"--json-keys {' '.join(keys)} names a key twice; name it once")
    if config.engine not in ENGINES:
        raise ValueError(f"--engine {config.engine} is not one of {', '.join(ENGINES)}")
    if not config.max_document_mb > 0:
        raise ValueError(f"--max-document-mb {config.max_document_mb} must be above 0")
    if not 0 <= config.verify_fraction <= 1:
        raise ValueError(f"--verify-fraction {config.verify_fraction} must lie between 0 and 1")
    folder = Path(config.output_prefix).parent
    if not folder.is_dir():
        raise ValueError(f"the output folder {folder} does not exist; create it first")


def _check_tokenizer(config: PreprocessConfig, tokenizer: Tokenizer, ids: dict[str, int]) -> None:
    if config.append_eod and tokenizer.eod is None:
        raise ValueError(
            f"--append-eod needs an end-of-document token, but {config.tokenizer_model} has no "
            "eos_token; set one in its tokenizer_config.json"
        )
    dtype, highest = token_dtype(tokenizer.vocab_size), max(ids.values())
    if highest > np.iinfo(dtype).max:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but an id {highest}, which does not "
            f"fit into the {dtype.__name__} that Megatron stores for that many"
        )


def left_out(prefix: str) -> str:
    """Of a dataset's run: records left out, by reason, and files without a text; may be empty."""
    about = json.loads(Path(f"{prefix}.json").read_text())
    skipped, files, said = about["skipped"], about["without_text"], []
    if skipped:
        reasons = "; ".join(f"{number:,}: {reason}" for reason, number in skipped.items())
        said.append(f"left out {sum(skipped.values()):,} records ({reasons})")
    if files:
        names = ", ".join(files[:3]) + ", ..." * (len(files) > 3)
        said.append(f"{len(files):,} of {len(about['inputs']):,} files gave no text ({names})")
    return "But: " * bool(said) + ", ".join(said)


def _known_outputs(config: PreprocessConfig) -> list[str]:
    names = [dataset_name("", key) + ending for key in config.json_keys for ending in ENDINGS]
    if config.split_by_meta is not None:  # its datasets are not known yet
        names = [f"{key}_blend.txt" for key in config.json_keys]
    return [f"{config.output_prefix}_{name}" for name in names]


WAYS = (
    "tokenizer_type special_tokens tokenizer_hf_no_use_fast tokenizer_sentencepiece_legacy".split()
)
"""Flags by which one tokenizer may give other tokens."""


def _identity(config: PreprocessConfig, paths: list[str], ids: dict[str, int]) -> dict[str, Any]:
    return {
        "tokenizer": tokenizer_fingerprint(ids),
        "input": [[path, os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in paths],
        "json_keys": config.json_keys,
        "split_by_meta": config.split_by_meta,
        "append_eod": config.append_eod,
        "engine": config.engine,
        "include_special_tokens": not config.tokenizer_hf_no_include_special_tokens,
        **{name: getattr(config, name) for name in WAYS},
    }


@dataclass(frozen=True)
class _Job:
    """From the inputs to what is to be published."""

    config: PreprocessConfig
    paths: list[str]
    tokenizer: Tokenizer
    dtype: type[np.number]
    eod: int | None
    workplace: Workplace

    def tokenize(self) -> None:
        """Tokenize what no earlier call has; start over should gigatoken prove wrong."""
        state = self.workplace.state
        if state.is_begun:
            done = sum(counts["documents"] for counts in state.counts.values())
            _tell(f"going on with {self.workplace.folder}: {done:,} documents are done")
        try:
            self._run(state.engine)
        except EngineDiffers as error:
            self.workplace.start_over("tokenizers")
            fault = f"gigatoken gives other tokens than the tokenizer's own library for {error}"
            if self.config.engine == "gigatoken":
                raise ValueError(f"{fault}; use --engine auto or tokenizers") from error
            _tell(f"{fault}: starting over with the library")
            self._run("tokenizers")

    def _run(self, engine_name: str) -> None:
        config = self.config
        engine = make_engine(engine_name, self.tokenizer, _tell)
        self.workplace.state.engine = engine.name
        wanted, longest = columns(config.json_keys, config.split_by_meta), config.max_document_mb
        inputs = [InputFile(path, i, wanted, longest) for i, path in enumerate(self.paths)]
        encoder = BlockEncoder(
            engine=engine,
            verify_fraction=config.verify_fraction,
            keys=config.json_keys,
            group_key=config.split_by_meta,
            eod=self.eod,
            dtype=self.dtype,
            on_error=config.on_error,
            max_document_mb=config.max_document_mb,
        )
        Stream(inputs, encoder, self.workplace).run(config.workers, config.log_interval)

    def complete(self) -> None:
        """Write what belongs to the tokens, and decide where everything goes."""
        state, folder = self.workplace.state, self.workplace.folder
        empty = [name for name, counts in state.counts.items() if not counts["tokens"]]
        # One of several subsets may well be empty; the blend leaves it out.
        if len(empty) == len(state.counts) or (empty and not self.config.split_by_meta):
            raise ValueError(
                f"no text was found for {', '.join(empty) or self.config.output_prefix}; check "
                "--input and --json-keys"
                + "".join(f"; {n:,} records left out: {why}" for why, n in state.skipped.items())
            )
        with_text = set(state.with_text)
        record = {
            "tool_version": __version__,
            "engine": state.engine,
            "tokenizer_fingerprint": state.identity["tokenizer"],
            "vocab_size": self.tokenizer.vocab_size,
            "eod_id": self.eod,
            "arguments": asdict(self.config),
            "inputs": state.inputs,
            "skipped": state.skipped,
            "without_text": [p for i, p in enumerate(self.paths) if i not in with_text],
        }
        made = []
        for name, counts in state.counts.items():
            write_index(folder / name, self.dtype)
            (folder / f"{name}.json").write_text(json.dumps(record | counts, indent=2))
            made += [name + ending for ending in ENDINGS]
        if state.skipped:
            made.append("skipped.jsonl")
        for key in self.config.json_keys if self.config.split_by_meta else ():
            made.append(f"{key}_blend.txt")  # behind the datasets that it lists
            (folder / made[-1]).write_text(self._blend(key))
        state.moves = {name: f"{self.config.output_prefix}_{name}" for name in made}
        self.workplace.save()

    def _blend(self, key: str) -> str:
        """A key's datasets that are not empty, weighed by their tokens."""
        prefix, end = self.config.output_prefix, f"_{dataset_name('', key)}"
        sizes = {name: counts["tokens"] for name, counts in self.workplace.state.counts.items()}
        found = [f"{n} {prefix}_{name}" for name, n in sizes.items() if n and name.endswith(end)]
        return " ".join(found) + "\n"


def _tell(line: str) -> None:
    tqdm.write(f"> {line}", file=sys.stderr)
