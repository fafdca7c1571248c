"""Pairs are looked into and joined; a damaged one is named with its damage."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_let.commands import inspect_data, merge_datasets
from megatron_let.commands.merge_datasets import merge
from megatron_let.data.inspect import check_tokens, checksum, open_pair, summary
from megatron_let.data.preprocess import PreprocessConfig, preprocess
from megatron_let.data.tokenizer import TokenizerConfig, load_tokenizer
from megatron_let.errors import UsageError
from tests.unit.data.test_preprocess import EOD, make_records, save_tokenizer, write_jsonl

HEAD = 34  # bytes in front of the lengths


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def make_pair(folder: Path, name: str, tokenizer: str, documents: int = 20) -> str:
    source = write_jsonl(folder / f"{name}.jsonl", make_records(documents))
    config = PreprocessConfig(
        input=(source,), output_prefix=str(folder / name), tokenizer_model=tokenizer
    )
    return preprocess(config)[0]


@pytest.fixture
def prefix(tmp_path: Path, tokenizer_model: str) -> str:
    return make_pair(tmp_path, "a", tokenizer_model)


def test_a_pair_is_read_as_megatron_reads_it(prefix: str) -> None:
    pair, dataset = open_pair(prefix), IndexedDataset(prefix)
    tokens = sum(len(ids) for ids in dataset)
    assert pair.counts == {"documents": 20, "empty_documents": 1, "tokens": tokens}
    assert np.array_equal(pair.lengths, dataset.sequence_lengths)
    assert np.array_equal(pair.documents, dataset.document_indices)
    assert len(pair.document(1)) == 0
    assert np.array_equal(pair.document(2), dataset[1])
    check_tokens(pair, pair.sidecar["vocab_size"])
    assert len(set(checksum(pair).values())) == 2


def test_summary_fits_a_screen_and_adds_up(prefix: str) -> None:
    text = summary(open_pair(prefix))
    assert "20 documents (1 empty)" in text
    assert len(text.splitlines()) < 24 and max(map(len, text.splitlines()[1:])) <= 100
    counts = [int(line.split()[3]) for line in text.splitlines() if line.startswith("  up to")]
    assert sum(counts) == 20


def change(path: Path, offset: int, form: str, value: int) -> None:
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, offset, value)
    path.write_bytes(content)


def set_count(prefix: str, key: str, value: object) -> None:
    sidecar = Path(f"{prefix}.json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {key: value}))


DAMAGES: dict[str, tuple[Callable[[str], object], str]] = {
    "no index": (lambda p: Path(f"{p}.idx").unlink(), ".idx does not exist"),
    "no tokens": (lambda p: Path(f"{p}.bin").unlink(), ".bin does not exist"),
    "not an index": (lambda p: Path(f"{p}.idx").write_text("text"), "is no index of Megatron's"),
    "version": (lambda p: change(Path(f"{p}.idx"), 9, "<Q", 2), "version 2 and token type 8"),
    "token type": (lambda p: change(Path(f"{p}.idx"), 17, "<B", 77), "token type 77"),
    "cut index": (
        lambda p: Path(f"{p}.idx").write_bytes(Path(f"{p}.idx").read_bytes()[:-8]),
        "it was cut off or is not complete",
    ),
    "length": (lambda p: change(Path(f"{p}.idx"), HEAD, "<i", -1), "negative length"),
    "pointer": (
        lambda p: change(Path(f"{p}.idx"), HEAD + 4 * 19 + 8, "<q", 2),
        "do not follow each other",
    ),
    "documents": (
        lambda p: change(Path(f"{p}.idx"), HEAD + 12 * 19, "<q", 1),
        "documents that do not cover its 19 sequences",
    ),
    "cut tokens": (
        lambda p: Path(f"{p}.bin").write_bytes(Path(f"{p}.bin").read_bytes()[:-2]),
        "speaks of",
    ),
    "token id": (lambda p: change(Path(f"{p}.bin"), 4, "<H", 60_000), "the id 60000 at token 2"),
    "no sidecar": (lambda p: Path(f"{p}.json").write_text(""), "a_text_document.json is damaged"),
    "a list": (lambda p: Path(f"{p}.json").write_text("[]"), "is damaged (no JSON object)"),
    "counts": (lambda p: set_count(p, "tokens", 5), "json says 5: one of them was replaced"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(prefix: str, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    inflict, message = DAMAGES[damage]
    inflict(prefix)
    with pytest.raises(SystemExit) as exit_status:
        inspect_data.main([prefix])
    assert exit_status.value.code == 2
    assert message in capsys.readouterr().err


def test_tool_shows_documents(
    prefix: str, tokenizer_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect_data.main([prefix, "--tokenizer-model", tokenizer_model, "--checksum"])
    said = capsys.readouterr().out
    assert "every token id were checked" in said and said.count("sha256") == 2
    shown = [line for line in said.splitlines() if line.startswith("document ")]
    assert len(shown) == 2
    texts = {str(record["text"])[:20] for record in make_records(20)}
    assert any(text in shown[0] for text in texts if text)
    assert "WARNING" not in said
    set_count(prefix, "tokenizer_fingerprint", "0123456789abcdef")
    inspect_data.main([prefix, "--tokenizer-model", tokenizer_model, "--documents", "0"])
    assert "made with another tokenizer (fingerprint 0123456789ab)" in capsys.readouterr().out
    small = save_tokenizer(Path(prefix).parent / "small", size=260)
    with pytest.raises(SystemExit):
        inspect_data.main([prefix, "--tokenizer-model", small])
    assert f"--tokenizer-model {small} has 260 tokens: give the" in capsys.readouterr().err
    Path(f"{prefix}.json").unlink()
    change(Path(f"{prefix}.bin"), 4, "<H", 60_000)
    with pytest.raises(SystemExit):
        inspect_data.main([prefix, "--tokenizer-model", tokenizer_model])
    assert "the id 60000 at token 2" in capsys.readouterr().err


def test_tool_takes_the_flags_by_which_the_data_were_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocab.write_text(json.dumps({letter: i for i, letter in enumerate("abc")} | {EOD: 3}))
    merges.write_text("#version: 0.2\n")
    kind = {
        "tokenizer_type": "GPT2BPETokenizer",
        "vocab_file": str(vocab),
        "merge_file": str(merges),
    }
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "abba"}])
    (prefix,) = preprocess(
        PreprocessConfig(input=(source,), output_prefix=str(tmp_path / "out"), **kind)
    )
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in kind.items()]
    inspect_data.main([prefix, *flags])
    said = capsys.readouterr().out
    assert said.endswith("document 0 (4 tokens): abba\n") and "WARNING" not in said
    with pytest.raises(SystemExit):
        inspect_data.main([prefix, "--documents", "5"])
    assert "--documents needs --tokenizer-model" in capsys.readouterr().err


def test_a_list_of_tokens_may_have_gaps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(save_tokenizer(tmp_path / "gaps")) / "tokenizer.json"
    source = json.loads(file.read_text())
    vocab = source["model"]["vocab"]
    vocab |= {token: index + 50 for token, index in vocab.items() if len(token) > 1 and index > 200}
    file.write_text(json.dumps(source))
    prefix = make_pair(tmp_path, "a", str(file.parent))
    largest = int(np.fromfile(f"{prefix}.bin", np.uint16).max())
    assert largest >= load_tokenizer(TokenizerConfig(tokenizer_model=str(file.parent))).vocab_size
    inspect_data.main([prefix])
    Path(f"{prefix}.json").unlink()
    inspect_data.main([prefix, "--tokenizer-model", str(file.parent)])
    assert capsys.readouterr().out.count("every token id were checked") == 2


def test_merged_pair_is_megatrons(tmp_path: Path, tokenizer_model: str) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    parts = [make_pair(folder, name, tokenizer_model, n) for name, n in (("b", 30), ("a", 20))]
    for part in parts:
        sidecar = Path(f"{part}.json")
        sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"skipped": {"why": 2}}))
    merge_datasets.main(f"--input {folder} --output-prefix {tmp_path}/all".split())
    builder = IndexedDatasetBuilder(str(tmp_path / "reference.bin"), dtype=np.uint16)
    for part in sorted(parts):
        builder.add_index(part)
    builder.finalize(str(tmp_path / "reference.idx"))
    for suffix in (".bin", ".idx"):
        expected = (tmp_path / f"reference{suffix}").read_bytes()
        assert (tmp_path / f"all{suffix}").read_bytes() == expected
    pair = open_pair(str(tmp_path / "all"))
    check_tokens(pair, pair.sidecar["vocab_size"])
    assert (pair.sidecar["documents"], pair.sidecar["skipped"]) == (50, {"why": 4})
    assert len(summary(pair).splitlines()) < 24


def test_pairs_of_two_tokenizers_are_not_merged(tmp_path: Path, tokenizer_model: str) -> None:
    ours = make_pair(tmp_path, "a", tokenizer_model)
    theirs = make_pair(tmp_path, "b", save_tokenizer(tmp_path / "other", bos="<s>"))
    with pytest.raises(ValueError, match="made with different tokenizers"):
        merge([ours, theirs], str(tmp_path / "all"))
    builder = IndexedDatasetBuilder(str(tmp_path / "wide.bin"), dtype=np.int32)
    builder.add_document(np.array([1]), [1])
    builder.finalize(str(tmp_path / "wide.idx"))
    with pytest.raises(ValueError, match="holds int32 and .* uint16"):
        merge([ours, str(tmp_path / "wide")], str(tmp_path / "all"))
    assert not list(tmp_path.glob("all*"))


@pytest.mark.parametrize(
    "other, message",
    [
        ({"eod_id": 0}, "eod_id None and .* 0: their documents end differently"),
        ({"around_text": [5]}, r"around_text \[\] and .* \[5\]: one holds what the tokenizer puts"),
    ],
)
def test_pairs_that_were_made_otherwise_are_not_merged(
    tmp_path: Path, prefix: str, other: dict[str, object], message: str
) -> None:
    sidecar = Path(f"{prefix}.json")
    shutil.copytree(tmp_path, tmp_path / "other")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | other))
    with pytest.raises(UsageError, match=message):
        merge([prefix, f"{tmp_path}/other/a_text_document"], str(tmp_path / "all"))


def test_a_sidecar_may_say_little(tmp_path: Path, prefix: str) -> None:
    Path(f"{prefix}.json").write_text('{"tokenizer_fingerprint": "x", "documents": 20}')
    assert "20 documents" in summary(open_pair(prefix))
    merge([prefix, prefix], str(tmp_path / "all"))
    sidecar = open_pair(str(tmp_path / "all")).sidecar
    assert (sidecar["tokenizer_fingerprint"], sidecar["documents"]) == ("x", 40)


def linked(folder: Path) -> None:
    folder.mkdir()
    for ending in (".bin", ".idx"):
        (folder / f"x{ending}").touch()
        (folder / f"y{ending}").symlink_to(folder / f"x{ending}")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: None, "is no folder"),
        (lambda folder: folder.mkdir(), "holds no .bin/.idx pair"),
        (lambda folder: (folder.mkdir(), (folder / "x.bin").touch()), "x has no .idx"),
        (linked, "in/y is x by another name"),
    ],
)
def test_merge_names_what_is_wrong_with_a_folder(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], object],
    message: str,
) -> None:
    make(tmp_path / "in")
    with pytest.raises(SystemExit):
        merge_datasets.main(f"--input {tmp_path}/in --output-prefix {tmp_path}/all".split())
    assert message in capsys.readouterr().err


def test_what_was_merged_is_not_merged_with_its_parts(tmp_path: Path, prefix: str) -> None:
    folder = Path(prefix).parent
    merge([prefix], str(folder / "all"))
    with pytest.raises(ValueError, match="all was merged from .*would be there twice"):
        merge([str(folder / "all"), prefix], str(tmp_path / "again"))
    merge([str(folder / "all")], str(folder / "whole"))
    with pytest.raises(ValueError, match="whole was merged from .*would be there twice"):
        merge([str(folder / "whole"), prefix], str(tmp_path / "again"))


def test_merge_overwrites_nothing(tmp_path: Path, prefix: str) -> None:
    (tmp_path / "all.idx").write_text("precious")
    with pytest.raises(ValueError, match="exists already"):
        merge([prefix], str(tmp_path / "all"))
    assert (tmp_path / "all.idx").read_text() == "precious"
    with pytest.raises(ValueError, match="output folder .*absent does not exist"):
        merge([prefix], str(tmp_path / "absent" / "all"))
