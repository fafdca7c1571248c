"""Tokenize texts into .bin/.idx pairs, byte for byte those of Megatron's own preprocess_data.py.

Reading and writing happen in `stream`; `encode` runs in the workers; `workplace` makes a killed run
go on.
"""

import json
import os
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_let import __version__
from megatron_let.data.encode import EngineDiffers, PreprocessConfig, dataset_name
from megatron_let.data.engines import ENGINES
from megatron_let.data.indexed import (
    ENDINGS,
    check_absent,
    check_folder_of,
    token_dtype,
    write_index,
)
from megatron_let.data.sources import expand
from megatron_let.data.stream import Stream, tell
from megatron_let.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_fingerprint
from megatron_let.data.workplace import Workplace


def preprocess(config: PreprocessConfig) -> list[str]:
    """Tokenize `config.input`; return the path, without suffix, of each dataset written.

    Nothing appears at the final paths before everything has succeeded. Raises ValueError for
    anything the caller can put right, as docs/data.md lists it.
    """
    _check(config)
    paths = expand(config.input)
    tokenizer = load_tokenizer(config)
    ids = tokenizer.ids()
    identity = _identity(config, paths, tokenizer)
    with closing(Workplace(config.output_prefix, identity, config.engine)) as workplace:
        if not workplace.state.moves:
            names = [f"{dataset_name('', key)}{end}" for key in config.json_keys for end in ENDINGS]
            if config.split_by_meta is not None:  # its datasets are not known yet
                names = [f"{key}_blend.txt" for key in config.json_keys]
            names += ["skipped.jsonl"] * (config.on_error == "skip")
            check_absent(f"{config.output_prefix}_{name}" for name in names)
            _check_tokenizer(config, tokenizer, ids)
            _tokenize(config, paths, tokenizer, workplace)
            _complete(config, paths, tokenizer, workplace)
        workplace.publish()
    written = workplace.state.moves.values()
    return [path.removesuffix(".idx") for path in written if path.endswith(".idx")]


def _check(config: PreprocessConfig) -> None:
    keys, prefix = config.json_keys, config.output_prefix
    numbers = f"--workers {config.workers} and --log-interval {config.log_interval}"
    fraction = f"--verify-fraction {config.verify_fraction}"
    for is_good, problem in (
        (min(config.workers, config.log_interval) >= 1, f"{numbers} must both be at least 1"),
        (config.input and keys, "--input and --json-keys must each name at least one value"),
        (
            len(set(keys)) == len(keys),
            f"--json-keys {' '.join(keys)} names a key twice; name it once",
        ),
        (config.engine in ENGINES, f"--engine {config.engine} is not one of {', '.join(ENGINES)}"),
        (
            not config.split_by_meta or len(prefix.split()) == 1,
            f"--output-prefix {prefix!r} has a blank in it, at which Megatron would cut the names "
            "in the blend of --split-by-meta; choose another",
        ),
        (
            0 < config.max_document_mb <= 2000,  # its tokens are counted in 31 bits
            f"--max-document-mb {config.max_document_mb} must be above 0 and at most 2000",
        ),
        (0 <= config.verify_fraction <= 1, f"{fraction} must lie between 0 and 1"),
    ):
        if not is_good:
            raise ValueError(problem)
    check_folder_of(prefix)


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


WAYS = (
    "tokenizer_type special_tokens tokenizer_hf_no_use_fast tokenizer_sentencepiece_legacy".split()
)
"""Flags by which one tokenizer may give other tokens."""


def _identity(config: PreprocessConfig, paths: list[str], tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "tokenizer": tokenizer_fingerprint(tokenizer.ids()),
        "around_text": tokenizer.tokenize(""),
        "eod_id": tokenizer.eod if config.append_eod else None,
        "input": [[path, os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in paths],
        "json_keys": config.json_keys,
        "split_by_meta": config.split_by_meta,
        "append_eod": config.append_eod,
        "engine": config.engine,
        **{name: getattr(config, name) for name in WAYS},
    }


def _tokenize(
    config: PreprocessConfig, paths: list[str], tokenizer: Tokenizer, workplace: Workplace
) -> None:
    """Tokenize what no earlier call has; start over should gigatoken prove wrong."""
    state = workplace.state
    if state.is_begun:
        done = sum(counts["documents"] for counts in state.counts.values())
        tell(f"going on with {workplace.folder}: {done:,} documents are done")
    try:
        Stream(config, paths, tokenizer, workplace).run()
    except EngineDiffers as error:
        workplace.start_over("tokenizers")
        fault = f"gigatoken gives other tokens than the tokenizer's own library for {error}"
        if config.engine == "gigatoken":
            raise ValueError(f"{fault}; use --engine auto or tokenizers") from error
        tell(f"{fault}: starting over with the library")
        Stream(config, paths, tokenizer, workplace).run()


def _complete(
    config: PreprocessConfig, paths: list[str], tokenizer: Tokenizer, workplace: Workplace
) -> None:
    """Write what belongs to the tokens, and decide where everything goes."""
    state, folder = workplace.state, workplace.folder
    empty = [name for name, counts in state.counts.items() if not counts["tokens"]]
    # One of several subsets may well be empty; the blend leaves it out.
    if len(empty) == len(state.counts) or (empty and not config.split_by_meta):
        raise ValueError(
            f"no text was found for {', '.join(empty) or config.output_prefix}; check "
            "--input and --json-keys"
            + "".join(f"; {n:,} records left out: {why}" for why, n in state.skipped.items())
        )
    with_text = set(state.with_text)
    record = {
        "tool_version": __version__,
        "engine": state.engine,
        "tokenizer_fingerprint": state.identity["tokenizer"],
        "vocab_size": max(tokenizer.ids().values()) + 1,  # a list of tokens may have gaps
        "around_text": tokenizer.tokenize(""),
        "eod_id": tokenizer.eod if config.append_eod else None,
        "arguments": asdict(config),
        "inputs": state.inputs,
        "skipped": state.skipped,
        "without_text": [p for i, p in enumerate(paths) if i not in with_text],
    }
    made = []
    for name, counts in state.counts.items():
        write_index(folder / name, token_dtype(tokenizer.vocab_size))
        (folder / f"{name}.json").write_text(json.dumps(record | counts, indent=2))
        made += [name + ending for ending in ENDINGS]
    if state.skipped:
        made.append("skipped.jsonl")
    for key in config.json_keys if config.split_by_meta else ():
        # Behind the datasets that it lists, as far as they are not empty, weighed by their tokens.
        made.append(f"{key}_blend.txt")
        names = [dataset_name(group, key) for group in dict.fromkeys(state.groups.values())]
        listed = [(state.counts[name]["tokens"], name) for name in names if name in state.counts]
        blend = " ".join(f"{n} {config.output_prefix}_{name}" for n, name in listed if n)
        (folder / made[-1]).write_text(f"{blend}\n")
    state.moves = {name: f"{config.output_prefix}_{name}" for name in made}
    workplace.save()
