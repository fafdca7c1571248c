"""Every kind of bad input that docs/data.md lists gets the message listed there."""

import gzip
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from megatron_let.data import stream
from megatron_let.data.preprocess import PreprocessConfig, preprocess
from tests.unit.data.test_preprocess import make_records, save_tokenizer, write_jsonl

DOCS = Path(__file__).resolve().parents[3] / "docs" / "data.md"
Config = dict[str, Any]


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def config(tmp_path: Path, tokenizer_model: str) -> Config:
    source = write_jsonl(tmp_path / "in.jsonl", make_records(200))
    (tmp_path / "out").mkdir()
    return {
        "input": (source,),
        "output_prefix": str(tmp_path / "out" / "x"),
        "tokenizer_model": tokenizer_model,
    }


def line(content: bytes, **change: Any) -> Callable[[Path, Config], Config]:
    """A record that is no document, at line 201."""

    def make(folder: Path, config: Config) -> Config:
        with open(folder / "in.jsonl", "ab") as file:
            file.write(content + b"\n" + b'{"text": "good"}\n' * 20)
        return change

    return make


def file(name: str, content: bytes | Callable[[bytes], bytes]) -> Callable[[Path, Config], Config]:
    """An input of that name, made from a good one."""

    def make(folder: Path, config: Config) -> Config:
        good = (folder / "in.jsonl").read_bytes()
        (folder / name).write_bytes(content if isinstance(content, bytes) else content(good))
        return {"input": (str(folder / name),)}

    return make


def change(**values: Any) -> Callable[[Path, Config], Config]:
    """Another argument."""
    return lambda folder, config: values


def model_alone(folder: Path, config: Config) -> Config:
    """For a Gemma, transformers makes up five special tokens, one of them for any word."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "gemma3_text"}')
    return {"tokenizer_model": str(folder / "model")}


def table(folder: Path, config: Config) -> Config:
    parquet.write_table(pyarrow.table({"body": ["a"]}), folder / "in.parquet")
    return {"input": (str(folder / "in.parquet"),)}


def not_utf8(folder: Path, config: Config) -> Config:
    texts = pyarrow.array([b"good", b"\xff", b"good"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), folder / "in.parquet")
    return {"input": (str(folder / "in.parquet"),)}


def damaged_rows(folder: Path, config: Config) -> Config:
    """The first of three row groups."""
    path, dice = folder / "in.parquet", random.Random(0)
    texts = [dice.randbytes(30).hex() for _ in range(300)]
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=100)
    start = parquet.ParquetFile(path).metadata.row_group(0).column(0).dictionary_page_offset
    content = bytearray(path.read_bytes())
    content[start + 1000 : start + 1200] = b"\xff" * 200
    path.write_bytes(content)
    return {"input": (str(path),)}


def endless(name: str, start: str = "") -> Callable[[Path, Config], Config]:
    """A record, behind `start`, that goes on and on, and a good one behind it."""

    def make(folder: Path, config: Config) -> Config:
        (folder / name).write_text(start + "x" * 200_000 + '\n{"text": "good"}\n')
        return {"input": (str(folder / name),), "max_document_mb": 0.001}

    return make


def packed_too(folder: Path, config: Config) -> Config:
    (folder / "both").mkdir()
    for name in ("x.jsonl", "x.jsonl.gz"):
        (folder / "both" / name).write_bytes(b"")
    return {"input": (str(folder / "both"),)}


def other_name(folder: Path, config: Config) -> Config:
    os.link(folder / "in.jsonl", folder / "link.jsonl")
    return {"input": (*config["input"], str(folder / "link.jsonl"))}


def subset_names(folder: Path, config: Config) -> Config:
    values = ["a b", "a-b"]
    lines = [json.dumps({"text": "x", "meta": {"set": value}}) for value in values]
    (folder / "in.jsonl").write_text("\n".join(lines))
    return {"split_by_meta": "set"}


def many_subsets(folder: Path, config: Config) -> Config:
    count = stream.MAX_DATASETS + 1
    lines = [json.dumps({"text": "x", "meta": {"set": str(value)}}) for value in range(count)]
    (folder / "in.jsonl").write_text("\n".join(lines))
    return {"split_by_meta": "set"}


def existing(folder: Path, config: Config) -> Config:
    Path(f"{config['output_prefix']}_text_document.idx").write_text("precious")
    return {}


def no_eos(folder: Path, config: Config) -> Config:
    return {"tokenizer_model": save_tokenizer(folder / "none", eos=None), "append_eod": True}


def cut(packed: bytes) -> bytes:
    """Without its last bytes, the checksum: every line is still there, yet it is not whole."""
    return packed[:-2]


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


GPT2 = {"tokenizer_type": "GPT2BPETokenizer", "tokenizer_model": None}
BAD_RECORDS = {
    "a line cut off": b'{"text": "cut',
    "an empty line": b"",
    "a line that is not UTF-8": b'{"text": "\xff"}',
    "brackets without end": b"[" * 10_000,
    "a line that is no object": b'["text"]',
    "a record without the key": b'{"body": "x"}',
    "a text that is no string": b'{"text": null}',
    "half a surrogate pair": b'{"text": "\\ud800"}',
}
BAD: dict[str, Callable[[Path, Config], Config]] = {
    **{kind: line(content) for kind, content in BAD_RECORDS.items()},
    "a record without the meta key": line(b'{"text": "x"}', split_by_meta="set"),
    "two subsets of one name": subset_names,
    "too many subsets": many_subsets,
    "an absent file": change(input=("absent.jsonl",)),
    "a pattern without a match": change(input=("absent*.jsonl",)),
    "a folder without inputs": lambda folder, config: {"input": (str(folder / "out"),)},
    "a file of another kind": file("in.csv", b"text"),
    "a file named twice": lambda folder, config: {"input": config["input"] * 2},
    "a file under two names": other_name,
    "a file and itself packed": packed_too,
    "a truncated .zst": file("in.jsonl.zst", lambda good: cut(zstd(good))),
    "a damaged .zst": file("in.jsonl.zst", lambda good: zstd(good) + b"garbage"),
    "a truncated .gz": file("in.jsonl.gz", lambda good: cut(gzip.compress(good))),
    "a damaged .gz": file("in.jsonl.gz", lambda good: gzip.compress(good) + b"garbage"),
    "a damaged .parquet": file("in.parquet", b"PAR1 garbage PAR1"),
    "a table without the column": table,
    "a cell that is not UTF-8": not_utf8,
    "a damaged row group": damaged_rows,
    "a text that is not UTF-8": file("in.txt", b"\xff"),
    "a text too long": change(max_document_mb=0.001),
    "a line without end": endless("in.jsonl", '{"text": "'),
    "a text without end": endless("in.txt"),
    "no text at all": file("in.jsonl", b""),
    "no input": change(input=()),
    "a key named twice": change(json_keys=("text", "text")),
    "an absent output folder": change(output_prefix="absent/out"),
    "an output that exists": existing,
    "an absent tokenizer": change(tokenizer_model="./no/such/folder"),
    "an unknown tokenizer type": change(tokenizer_type="NullTokenizer"),
    "GPT-2 without its files": change(**GPT2),
    "a model without a tokenizer": model_alone,
    "no tokenizer": change(tokenizer_model=None),
    "--append-eod without such a token": no_eos,
    "an unknown engine": change(engine="fast"),
    "a fraction outside 0 to 1": change(verify_fraction=2.0),
    "no worker": change(workers=0),
    "a blank in a blend": change(output_prefix="out of it/x", split_by_meta="set"),
    "no length": change(max_document_mb=0),
    "too great a length": change(max_document_mb=2001),
}


def documented() -> dict[str, str]:
    """The table of docs/data.md: kind -> message."""
    rows = re.findall(r"^\| ([^|`]+?) \| `([^|]+)` \|$", DOCS.read_text(), re.MULTILINE)
    return dict(rows)


def test_the_table_is_complete() -> None:
    assert list(documented()) == list(BAD)


@pytest.mark.parametrize("kind", BAD)
def test_message_is_the_one_in_the_table(tmp_path: Path, config: Config, kind: str) -> None:
    values = config | BAD[kind](tmp_path, config)
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(ValueError) as refusal:
        preprocess(PreprocessConfig(**values))
    said = str(refusal.value)
    for part in documented()[kind].split(" ... "):
        assert part in said
    # Nothing is left but what was there, or a folder to go on from.
    after = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert after == before


@pytest.mark.parametrize("kind", BAD_RECORDS)
def test_a_bad_record_can_be_left_out(tmp_path: Path, config: Config, kind: str) -> None:
    BAD[kind](tmp_path, config)
    (prefix,) = preprocess(PreprocessConfig(**config | {"on_error": "skip"}))
    about = json.loads(Path(f"{prefix}.json").read_text())
    assert about["documents"] == 220 and sum(about["skipped"].values()) == 1
    (listed,) = Path(f"{config['output_prefix']}_skipped.jsonl").read_text().splitlines()
    skipped = json.loads(listed)
    assert skipped["record"] == 201 and skipped["path"] == config["input"][0]


def test_a_list_of_what_is_left_out_is_not_overwritten(tmp_path: Path, config: Config) -> None:
    listed = Path(f"{config['output_prefix']}_skipped.jsonl")  # by a call with another key
    listed.touch()
    with pytest.raises(ValueError, match="_skipped.jsonl exists already"):
        preprocess(PreprocessConfig(**config | {"on_error": "skip"}))
    assert list(listed.parent.iterdir()) == [listed]


@pytest.mark.parametrize(
    ("make", "kept", "reason", "record"),
    [
        (not_utf8, 2, {"the value of 'text' is not UTF-8": 1}, 2),
        (damaged_rows, 200, {"in a damaged row group": 100}, 1),
        (BAD["a text too long"], 199, {"longer than --max-document-mb 0.001": 1}, 5),
        (
            endless("in.jsonl", '{"text": "good"}\n{"text": "'),
            2,
            {"longer than --max-document-mb 0.001": 1},
            2,
        ),
    ],
)
def test_what_cannot_be_read_is_left_out_and_counted(
    tmp_path: Path, config: Config, make: Any, kept: int, reason: dict[str, int], record: int
) -> None:
    values = config | make(tmp_path, config) | {"on_error": "skip"}
    (prefix,) = preprocess(PreprocessConfig(**values))
    about = json.loads(Path(f"{prefix}.json").read_text())
    assert (about["documents"], about["skipped"]) == (kept, reason)
    (listed,) = Path(f"{config['output_prefix']}_skipped.jsonl").read_text().splitlines()
    assert json.loads(listed)["record"] == record


def test_a_table_with_a_damaged_end_is_named(tmp_path: Path, config: Config) -> None:
    path = tmp_path / "in.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"] * 100}), path)
    content = bytearray(path.read_bytes())
    content[-60:-8] = b"\xff" * 52
    path.write_bytes(content)
    with pytest.raises(ValueError, match="in.parquet is not a whole Parquet file: "):
        preprocess(PreprocessConfig(**config | {"input": (str(path),)}))
