"""The preprocessing tool writes what Megatron's own would, or says what is wrong and nothing."""

import gzip
import hashlib
import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from megatron.core.tokenizers import MegatronTokenizer
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import megatron_let
from megatron_let.data import sources
from megatron_let.data.documents import parse
from megatron_let.data.engines import Gigatoken, Rows
from megatron_let.data.preprocess import PreprocessConfig, preprocess
from megatron_let.data.sources import Position
from megatron_let.data.tokenizer import TokenizerConfig, load_tokenizer, tokenizer_fingerprint

TOOL = Path(__file__).resolve().parents[3] / "tools" / "preprocess_data.py"
EOD = "<|endoftext|>"
GOLDEN = [
    "0083d4886d2136cd5589849ba951d5d9ebaf99b17b335c0fe9378a8ef09718e7",
    "014cdbea818f47536c2ede674f686d79e8832fa289ab420de832510b5e359dd6",
]
"""SHA-256 of .bin and .idx that Megatron-LM v0.19's tools/preprocess_data.py --append-eod wrote."""
WORDS = "the quick brown fox jumps over a lazy dog while it rains in Spain".split()


def make_records(count: int) -> list[dict[str, object]]:
    """Return documents of varied length, with empty, special and non-ASCII ones among them."""
    rng = np.random.default_rng(7)
    records = [
        {"text": " ".join(rng.choice(WORDS, n)), "title": str(rng.choice(WORDS)), "score": int(n)}
        for n in rng.integers(1, 40, count)
    ]
    records[1]["text"] = ""
    records[2]["text"] = f"before{EOD}after\nline two\ttab"
    records[3]["text"] = "Sch\u00f6ne Gr\u00fc\u00dfe \u4f60\u597d \U0001f98a"
    records[4]["text"] = " ".join(rng.choice(WORDS, 3000))
    return records


def save_tokenizer(
    folder: Path, eos: str | None = EOD, bos: str | None = None, size: int = 320
) -> str:
    """Train a tiny byte-level BPE; with `bos` it adds that token by itself, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[token for token in (eos, bos) if token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, bos_token=bos, model_max_length=64
    ).save_pretrained(folder)
    return str(folder)


def write_jsonl(path: Path, records: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def dataset_bytes(prefix: str | Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def megatron_bytes(
    folder: Path, model: str, texts: list[str], append_eod: bool, special_tokens: bool = True
) -> tuple[bytes, bytes]:
    """Build the pair as Megatron's tool does: its tokenizer and builder, one text at a time."""
    tokenizer = MegatronTokenizer.from_pretrained(
        model, metadata_path={"library": "huggingface"}, include_special_tokens=special_tokens
    )
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(str(folder / "reference.bin"), dtype=dtype)
    for text in texts:
        ids = list(tokenizer.tokenize(text))
        if ids and append_eod:
            ids.append(tokenizer.eod)
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(str(folder / "reference.idx"))
    return dataset_bytes(folder / "reference")


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def bos_tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("bos_tokenizer"), bos="<s>")


@pytest.fixture
def tool() -> ModuleType:
    """Return the command-line tool as a module, loaded from its file."""
    spec = importlib.util.spec_from_file_location("preprocess_data", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(tmp_path: Path, tokenizer_model: str) -> dict[str, object]:
    """Return the arguments of a run that works; a test changes what it is about."""
    source = write_jsonl(tmp_path / "in.jsonl", make_records(20))
    return {
        "input": (source,),
        "output_prefix": str(tmp_path / "out"),
        "tokenizer_model": tokenizer_model,
    }


def assert_refused(config: dict[str, object], *messages: str) -> None:
    """Check that the run is refused with these words, leaving the folder as it was."""
    folder = Path(str(config["output_prefix"])).parent
    before = sorted(folder.glob("*"))
    with pytest.raises(ValueError) as refusal:
        preprocess(PreprocessConfig(**config))
    for message in messages:
        assert message in str(refusal.value)
    assert sorted(folder.glob("*")) == before


@pytest.mark.parametrize("append_eod", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_pair_is_byte_identical_with_megatron(
    tmp_path: Path, config: dict[str, object], append_eod: bool, workers: int
) -> None:
    records = make_records(700)  # several batches, so that the order of the workers matters
    config["input"] = (write_jsonl(tmp_path / "in.jsonl", records),)
    (prefix,) = preprocess(PreprocessConfig(**config, append_eod=append_eod, workers=workers))
    texts = [str(record["text"]) for record in records]
    expected = megatron_bytes(tmp_path, str(config["tokenizer_model"]), texts, append_eod)
    assert prefix == str(tmp_path / "out_text_document")
    assert dataset_bytes(prefix) == expected


@pytest.mark.parametrize("special_tokens", [True, False])
def test_tokens_added_by_the_tokenizer_are_megatrons(
    tmp_path: Path, config: dict[str, object], bos_tokenizer_model: str, special_tokens: bool
) -> None:
    config["tokenizer_model"] = bos_tokenizer_model
    config["tokenizer_hf_no_include_special_tokens"] = not special_tokens
    (prefix,) = preprocess(PreprocessConfig(**config, append_eod=True))
    texts = [str(record["text"]) for record in make_records(20)]
    expected = megatron_bytes(tmp_path, bos_tokenizer_model, texts, True, special_tokens)
    assert dataset_bytes(prefix) == expected
    bos = AutoTokenizer.from_pretrained(bos_tokenizer_model).bos_token_id
    dataset = IndexedDataset(prefix)  # kept: its items are views into it
    assert (dataset[0][0] == bos) == special_tokens


def test_documents_read_back_as_their_text(config: dict[str, object]) -> None:
    (prefix,) = preprocess(PreprocessConfig(**config, append_eod=True))
    tokenizer = AutoTokenizer.from_pretrained(config["tokenizer_model"])
    dataset = IndexedDataset(prefix)
    texts = [str(record["text"]) for record in make_records(20)]
    assert len(dataset) == 19 and len(dataset.document_indices) == 21  # one text is empty
    for ids, text in zip(dataset, filter(None, texts), strict=True):
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1]) == text


def test_compressed_files_give_the_same_pair(tmp_path: Path, config: dict[str, object]) -> None:
    (plain,) = preprocess(PreprocessConfig(**config))
    content = (tmp_path / "in.jsonl").read_bytes()
    # Two frames split inside a line, with a skippable frame between, as parallel zstd writes.
    frames = [zstandard.compress(content[:700]), zstandard.compress(content[700:])]
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
    (tmp_path / "in.jsonl.zst").write_bytes(skippable.join(frames))
    config |= {"input": (str(tmp_path / "in.jsonl.zst"),), "output_prefix": str(tmp_path / "zst")}
    (compressed,) = preprocess(PreprocessConfig(**config))
    assert dataset_bytes(compressed) == dataset_bytes(plain)


def write_as(folder: Path, form: str) -> str:
    """The records of in.jsonl in another form."""
    content = (folder / "in.jsonl").read_bytes()
    path = folder / f"same.{form}"
    if form == "jsonl.gz":  # two members, as `cat a.gz b.gz` leaves them
        path.write_bytes(gzip.compress(content[:700]) + gzip.compress(content[700:]))
    elif form == "parquet":
        rows = [json.loads(line) for line in content.splitlines()]
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=300)
    else:
        path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("form", ["json", "jsonl.gz", "parquet"])
def test_other_forms_give_the_same_pair(
    tmp_path: Path, config: dict[str, object], form: str
) -> None:
    config["input"] = (write_jsonl(tmp_path / "in.jsonl", make_records(1500)),)
    (plain,) = preprocess(PreprocessConfig(**config))
    config |= {"input": (write_as(tmp_path, form),), "output_prefix": str(tmp_path / "other")}
    (other,) = preprocess(PreprocessConfig(**config, workers=2))
    assert dataset_bytes(other) == dataset_bytes(plain)


def test_a_text_file_is_one_document(tmp_path: Path, config: dict[str, object]) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    texts = ["\ufeffone\ntwo\n", "", "three"]  # the mark that an editor puts in front is no text
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    config |= {"input": (str(folder),)}
    (prefix,) = preprocess(PreprocessConfig(**config))
    expected = megatron_bytes(
        tmp_path, str(config["tokenizer_model"]), ["one\ntwo\n", "three"], False
    )
    assert dataset_bytes(prefix) == expected  # an empty file holds no document


def test_rows_of_a_table_are_sent_without_the_others(tmp_path: Path) -> None:
    texts = [str(i) * 100_000 for i in range(100)]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "in.parquet")
    blocks = list(sources.InputFile(str(tmp_path / "in.parquet"), 0, ["text"]).blocks(Position()))
    assert len(blocks) > 1
    sent = sum(len(pickle.dumps(block, protocol=5)) for block in blocks)
    assert sent < 1.1 * sum(map(len, texts))
    found = [text for block in blocks for text in parse(block, ["text"], None).texts["text"]]
    assert found == texts


def test_a_blend_holds_the_subsets_of_its_key(tmp_path: Path, config: dict[str, object]) -> None:
    """A subset without a name too, of any script, and none of a key that ends like this one."""
    subsets = ["", "A", "B_\u4e2d\u6587", "\u0434 1"]
    records = [{"text": "a", "my_text": "b", "meta": {"set": name}} for name in subsets]
    config["input"] = (write_jsonl(tmp_path / "in.jsonl", records),)
    preprocess(PreprocessConfig(**config, json_keys=("text", "my_text"), split_by_meta="set"))
    for key in ("text", "my_text"):
        listed = (tmp_path / f"out_{key}_blend.txt").read_text().split()[1::2]
        names = ["out", "out_A", "out_B-\u4e2d\u6587", "out_\u0434-1"]
        names = [f"{name}_{key}_document" for name in names]
        assert [Path(prefix).name for prefix in listed] == names


def test_a_binary_column_is_text(tmp_path: Path, config: dict[str, object]) -> None:
    table = pyarrow.table({"text": [b"one", "Gr\u00fc\u00dfe".encode()]})
    parquet.write_table(table, tmp_path / "in.parquet")
    (prefix,) = preprocess(PreprocessConfig(**config | {"input": (str(tmp_path / "in.parquet"),)}))
    texts = ["one", "Gr\u00fc\u00dfe"]
    assert dataset_bytes(prefix) == megatron_bytes(
        tmp_path, str(config["tokenizer_model"]), texts, False
    )


def test_a_folder_gives_each_text_once(
    tmp_path: Path, config: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    """Not hidden files, what this tool wrote there, or other names of a file."""
    folder = tmp_path / "in"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / "later.partial").mkdir()
    source = write_jsonl(folder / "a.jsonl", make_records(30))
    config |= {"input": (source,), "output_prefix": str(folder / "own")}
    preprocess(PreprocessConfig(**config))
    hidden = (".a.jsonl", "._b.jsonl", ".ipynb_checkpoints/a.jsonl")
    own = ("own_skipped.jsonl", "own_text_blend.txt", "later.partial/x.json", "later.partial/lock")
    for name in (*hidden, *own):
        shutil.copy(source, folder / name)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(source, tmp_path / "elsewhere" / "b.jsonl")
    os.symlink(tmp_path / "elsewhere", folder / "linked")
    os.symlink(folder, folder / "back")
    (folder / "shown").mkdir()
    shutil.copy(source, folder / "shown" / "c.jsonl")
    os.symlink(folder / "shown", folder / "later.partial" / ".cache")
    os.symlink(source, folder / "z.jsonl")
    os.link(source, folder / "y.jsonl")
    capsys.readouterr()
    others = [str(folder / name) for name in ("linked/b.jsonl", "shown/c.jsonl")]
    assert sources.expand([str(folder)]) == [source, *others]
    said = capsys.readouterr().err.splitlines()
    assert [re.sub(r".*: left out (.*), such.*", r"\1", line) for line in said] == [
        "3 (hidden)",
        "4 (written by this tool)",
        "2 (another name of a file)",
    ]
    assert sources.expand([str(folder / "*.json*")]) == [source]


def test_the_last_line_says_what_was_left_out(
    tmp_path: Path, config: dict[str, object], tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"body": "x"}\n' * 500)
    flags = f"--output-prefix {tmp_path}/cli --tokenizer-model {config['tokenizer_model']}".split()
    tool.main(["--input", *config["input"], str(other), "--on-error", "skip", *flags])
    assert capsys.readouterr().out.splitlines()[-1] == (
        "But: left out 500 records (500: no key 'text'; check --json-key(s)), "
        f"1 of 2 files gave no text ({other})"
    )


def test_numbers_that_json_does_not_know_are_read(
    tmp_path: Path, config: dict[str, object]
) -> None:
    """Python's json writes NaN, and Megatron's tool reads it."""
    (tmp_path / "in.jsonl").write_text(
        '{"text": "a", "score": NaN}\n{"text": "b", "x": Infinity}\n'
    )
    (prefix,) = preprocess(PreprocessConfig(**config))
    assert len(IndexedDataset(prefix)) == 2


@pytest.mark.parametrize("length", [1, 2_000])
@pytest.mark.parametrize("document, fraction", [(30, 0.0), (450, 1.0)])
def test_an_engine_that_differs_is_found_out(
    tmp_path: Path,
    config: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    document: int,
    fraction: float,
    length: int,
) -> None:
    """Among the first hundred, or with that part of the others looked at; in a long one too."""
    records = make_records(500)
    records[document]["text"] = "fox Spain fox Spain " * length
    config["input"] = (write_jsonl(tmp_path / "in.jsonl", records),)
    right = Gigatoken.encode

    def wrong(self: Gigatoken, texts: list[str]) -> Rows:
        rows = right(self, texts)
        for index in (i for i, text in enumerate(texts) if text.startswith("fox Spain fox Spain")):
            rows[index] = rows[index] + 1
        return rows

    monkeypatch.setattr(Gigatoken, "encode", wrong)
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 2000)
    fault = f"gigatoken gives other tokens than the tokenizer's own library for .*:{document + 1} "
    with pytest.raises(ValueError, match=fault):
        preprocess(PreprocessConfig(**config, engine="gigatoken", verify_fraction=fraction))
    assert not list(tmp_path.glob("out*"))
    (prefix,) = preprocess(PreprocessConfig(**config, verify_fraction=fraction))
    assert re.search(fault + ".*starting over", capsys.readouterr().err)
    assert json.loads(Path(f"{prefix}.json").read_text())["engine"] == "tokenizers"
    texts = [str(record["text"]) for record in records]
    expected = megatron_bytes(tmp_path, str(config["tokenizer_model"]), texts, False)
    assert dataset_bytes(prefix) == expected


def test_gpt2_files_are_that_tokenizer(tmp_path: Path, config: dict[str, object]) -> None:
    folder = Path(str(config["tokenizer_model"]))
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (expected,) = preprocess(PreprocessConfig(**config, append_eod=True))
    config |= {"tokenizer_model": None, "tokenizer_type": "GPT2BPETokenizer"}
    config |= {"output_prefix": str(tmp_path / "gpt2"), "append_eod": True}
    config |= {"vocab_file": str(tmp_path / "vocab.json")}
    config |= {"merge_file": str(tmp_path / "merges.txt")}
    (prefix,) = preprocess(PreprocessConfig(**config))
    assert dataset_bytes(prefix) == dataset_bytes(expected)


def golden_input(folder: Path) -> dict[str, object]:
    """Unicode, empty, very long and one-token documents, and a tokenizer that no trainer made."""
    texts = ["", "a", "Sch\u00f6ne \u4f60\u597d \U0001f98a", EOD, "x " * 20_000, "the quick fox"]
    source = write_jsonl(folder / "in.jsonl", [{"text": text} for text in texts])
    merges = [("t", "h"), ("th", "e"), ("q", "u"), ("x", "\u0120"), ("\u0120", "f")]
    tokens = [EOD, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(m) for m in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOD)
    fast.save_pretrained(folder / "golden")
    return {"input": (source,), "tokenizer_model": str(folder / "golden")}


def test_golden_bytes(tmp_path: Path, config: dict[str, object]) -> None:
    """The pair of Megatron-LM v0.19's tool on these documents, by its hash."""
    config |= golden_input(tmp_path)
    for engine in ("gigatoken", "tokenizers"):
        config |= {"engine": engine, "output_prefix": str(tmp_path / engine), "append_eod": True}
        (prefix,) = preprocess(PreprocessConfig(**config))
        digests = [hashlib.sha256(part).hexdigest() for part in dataset_bytes(prefix)]
        assert digests == GOLDEN


def test_several_inputs_follow_each_other(tmp_path: Path, config: dict[str, object]) -> None:
    (whole,) = preprocess(PreprocessConfig(**config))
    records = make_records(20)
    (tmp_path / "b.jsonl").write_text("\r\n".join(map(json.dumps, records[:9])))  # no final newline
    last = write_jsonl(tmp_path / "a.jsonl", records[9:])
    config |= {"input": (str(tmp_path / "b.jsonl"), last), "output_prefix": str(tmp_path / "parts")}
    (parts,) = preprocess(PreprocessConfig(**config))
    assert dataset_bytes(parts) == dataset_bytes(whole)


def test_every_key_gets_a_complete_pair(tmp_path: Path, config: dict[str, object]) -> None:
    prefixes = preprocess(PreprocessConfig(**config, json_keys=("text", "title")))
    assert [Path(prefix).name for prefix in prefixes] == ["out_text_document", "out_title_document"]
    for prefix, key in zip(prefixes, ("text", "title"), strict=True):
        texts = [str(record[key]) for record in make_records(20)]
        expected = megatron_bytes(tmp_path, str(config["tokenizer_model"]), texts, False)
        assert dataset_bytes(prefix) == expected


def test_sidecar_says_what_made_the_pair(tmp_path: Path, config: dict[str, object]) -> None:
    (prefix,) = preprocess(PreprocessConfig(**config, append_eod=True))
    sidecar = json.loads(Path(prefix + ".json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(config["tokenizer_model"])
    content = (tmp_path / "in.jsonl").read_bytes()
    assert sidecar.pop("arguments")["append_eod"] is True
    assert sidecar == {
        "tool_version": megatron_let.__version__,
        "engine": "gigatoken",
        "skipped": {},
        "without_text": [],
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer.get_vocab()),
        "vocab_size": len(tokenizer),
        "around_text": [],
        "eod_id": tokenizer.eos_token_id,
        "inputs": [
            {
                "path": str(tmp_path / "in.jsonl"),
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        ],
        "documents": 20,
        "empty_documents": 1,
        "tokens": Path(prefix + ".bin").stat().st_size // 2,  # uint16: the vocabulary is small
        "text_bytes": sum(len(str(record["text"]).encode()) for record in make_records(20)),
    }


def test_fingerprint_depends_on_the_map_and_not_on_its_order() -> None:
    fingerprint = tokenizer_fingerprint({"a": 0, "\u00e9": 1, "\ud800": 2})
    assert len(fingerprint) == 64
    assert fingerprint == tokenizer_fingerprint({"\ud800": 2, "\u00e9": 1, "a": 0})
    assert fingerprint != tokenizer_fingerprint({"a": 1, "\u00e9": 0, "\ud800": 2})
    assert fingerprint != tokenizer_fingerprint({"a": 0, "\u00e9": 1})


def test_eod_is_the_eos_token(tokenizer_model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_model)
    assert load_tokenizer(
        TokenizerConfig(tokenizer_model=tokenizer_model)
    ).eod == tokenizer.convert_tokens_to_ids(EOD)


def test_progress_is_logged(config: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    preprocess(PreprocessConfig(**config, log_interval=15))
    error = capsys.readouterr().err
    lines = error.splitlines()
    assert [line.partition(" (")[0] for line in lines] == [
        "Processed 15 documents",
        "Processed 20 documents",
    ]  # nothing else, no bar
    assert all(line.endswith(" MB/s).") for line in lines)


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_existing_output_is_kept(tmp_path: Path, config: dict[str, object], suffix: str) -> None:
    existing = tmp_path / f"out_text_document{suffix}"
    existing.write_text("precious")
    assert_refused(config, str(existing), "choose another --output-prefix")
    assert existing.read_text() == "precious"


def test_tool_runs_with_megatrons_flags(
    tmp_path: Path, config: dict[str, object], tool: ModuleType
) -> None:
    (reference,) = preprocess(PreprocessConfig(**config, append_eod=True))
    flags = f"--input {tmp_path / 'in.jsonl'} --json-keys text --output-prefix {tmp_path / 'cli'}"
    flags += f" --tokenizer-type HuggingFaceTokenizer --tokenizer-model {config['tokenizer_model']}"
    tool.main((flags + " --append-eod --workers 2 --log-interval 5").split())
    assert dataset_bytes(tmp_path / "cli_text_document") == dataset_bytes(reference)


def test_tool_ends_in_one_clear_line(tmp_path: Path) -> None:
    """A real process in another folder: the tool finds its package and shows no traceback."""
    command = [sys.executable, str(TOOL), "--input", "absent.jsonl", "--output-prefix", "out"]
    command += ["--tokenizer-model", "any"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == (
        "megatron-let preprocess: error: input file absent.jsonl does not exist; check --input\n"
    )
