import hashlib
import json

import pytest

from megatron_let.quickstart import corpus
from megatron_let.quickstart.corpus import (
    Deduplicator,
    build_corpus,
    find_sources,
    split_by_package,
)

BOUNDS = {"max_train_bytes": 200_000, "max_valid_bytes": 50_000}


def body(name: str, lines: int = 40) -> str:
    """Distinct lines: no accidental duplicate between two names."""
    return "".join(f"{name}_{i} = '{name} number {i}'\n" for i in range(lines))


@pytest.fixture
def root(tmp_path):
    """A site-packages with 30 packages of one to three modules, and things to pass over."""
    root = tmp_path / "site-packages"
    for p in range(30):
        for m in range(1 + p % 3):
            write(root / f"pkg{p}" / "sub" / f"m{m}.py", body(f"p{p}m{m}"))
    write(root / "single.py", body("single"))
    write(root / "pkg0" / "empty.py", "")
    write(root / "pkg0" / "blank.py", "\n \n")
    write(root / "pkg0" / "huge.py", "x = 1\n" * 40_000)
    write(root / "pkg0" / "api_pb2.py", body("pb2"))
    write(
        root / "pkg0" / "gen.py", "# This file was automatically generated. DO NOT EDIT.\nx = 1\n"
    )
    write(root / "pkg0" / "data.txt", "no Python")
    write(root / "pkg0" / "__pycache__" / "cached.py", body("cached"))
    write(root / "pkg0-1.0.dist-info" / "setup.py", body("distinfo"))
    write(root / "megatron_let" / "ours.py", body("ours"))
    (root / "pkg0" / "latin.py").write_bytes(b"# caf\xe9\n" + body("latin").encode())
    return root


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def documents(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_split_keeps_packages_whole_and_both_sides_filled(root, tmp_path):
    report = build_corpus(tmp_path / "out", roots=[root], **BOUNDS)
    train, valid = (documents(tmp_path / "out" / f"{s}.jsonl") for s in ("train", "valid"))
    train_packages = {d["meta"]["package"] for d in train}
    valid_packages = {d["meta"]["package"] for d in valid}
    assert not train_packages & valid_packages
    assert len(train) + len(valid) == 61  # 60 modules and single.py; nothing else slipped in
    assert 0 < len(valid) <= 0.06 * 61
    assert report.train.packages == sorted(train_packages)
    assert report.train.bytes == sum(len(d["text"].encode()) for d in train)
    assert report.train.documents == len(train)
    assert report.train.unusable + report.valid.unusable == 3  # blank, generated, not UTF-8
    digest = hashlib.sha256((tmp_path / "out" / "valid.jsonl").read_bytes()).hexdigest()
    assert report.valid.sha256 == digest
    assert not list((tmp_path / "out").glob("*.partial"))


def test_same_tree_gives_the_same_files(root, tmp_path):
    one = build_corpus(tmp_path / "a", roots=[root], **BOUNDS)
    # A copy elsewhere, made in another order, as on another machine.
    for path in sorted(root.rglob("*"), reverse=True):
        if path.is_file():
            copy = tmp_path / "copy" / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    assert build_corpus(tmp_path / "b", roots=[tmp_path / "copy"], **BOUNDS) == one


def test_reuse_and_refusal(root, tmp_path):
    out = tmp_path / "out"
    report = build_corpus(out, roots=[root], **BOUNDS)
    before = (out / "train.jsonl").stat().st_mtime_ns
    assert build_corpus(out, roots=[tmp_path / "not looked at"], **BOUNDS) == report
    assert (out / "train.jsonl").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"200000, 50000\) instead of \(2, 99999, 50000\)"):
        build_corpus(out, max_train_bytes=99_999, max_valid_bytes=50_000, roots=[root])
    (out / "valid.jsonl").write_text("edited\n")
    with pytest.raises(ValueError, match=r"valid\.jsonl is not the file .*delete the folder"):
        build_corpus(out, roots=[root], **BOUNDS)


def test_killed_before_the_report_is_built_again(root, tmp_path):
    out = tmp_path / "out"
    report = build_corpus(out, roots=[root], **BOUNDS)
    (out / "corpus.json").unlink()
    (out / "valid.jsonl").write_text("torn")
    assert build_corpus(out, roots=[root], **BOUNDS) == report


def test_validation_loses_documents_that_train_has(root, tmp_path):
    valid_before = split_by_package(find_sources([root]))[1]
    victim = valid_before[0]
    text = victim.path.read_text()
    # Two of 40 lines changed, indented, in another package: Jaccard 38 / 42 = 0.90.
    edited = text.replace("number 3'", "number three'").replace("number 4'", "number four'")
    edited = "".join("    " + line for line in edited.splitlines(keepends=True))
    train_package = split_by_package(find_sources([root]))[0][0].package
    write(root / train_package / "vendored.py", edited)
    report = build_corpus(tmp_path / "out", roots=[root], **BOUNDS)
    kept = {d["meta"]["path"] for d in documents(tmp_path / "out" / "valid.jsonl")}
    assert victim.name not in kept
    assert report.valid.near_duplicates == 1
    assert f"{train_package}/vendored.py" in {
        d["meta"]["path"] for d in documents(tmp_path / "out" / "train.jsonl")
    }


def test_exact_duplicates_are_counted_apart(root, tmp_path):
    package = split_by_package(find_sources([root]))[0][0].package
    write(root / package / "copy.py", (root / package / "sub" / "m0.py").read_text())
    report = build_corpus(tmp_path / "out", roots=[root], **BOUNDS)
    assert (report.train.exact_duplicates, report.train.near_duplicates) == (1, 0)


@pytest.mark.parametrize(
    ("changed", "near"), [(0, True), (5, True), (11, True), (12, False), (50, False)]
)
def test_jaccard_threshold_is_exact(changed, near):
    # 100 lines, c of them replaced: Jaccard (100 - c) / (100 + c); 11 gives 0.802, 12 gives 0.786.
    seen = Deduplicator()
    seen.admit(body("a", 100))
    other = body("a", 100).splitlines()
    other[:changed] = body("b", changed).splitlines()
    assert seen.admit("\n".join(other)) == ("near" if near else "kept")


def test_a_pair_at_the_threshold_is_found_whichever_line_is_odd():
    # Nine lines, one replaced: Jaccard exactly 8 / 10.
    for n in range(100):
        kept, other = body(f"a{n}", 9).splitlines(), body(f"a{n}", 9).splitlines()
        other[n % 9] = f"odd_{n}"
        assert seen_before(["\n".join(kept)], "\n".join(other))


def seen_before(earlier, text) -> bool:
    seen = Deduplicator()
    for other in earlier:
        seen.admit(other)
    return seen.admit(text) == "near"


def test_limits(root, tmp_path):
    report = build_corpus(
        tmp_path / "out", max_train_bytes=20_000, max_valid_bytes=8_000, roots=[root]
    )
    assert 15_000 < report.train.bytes <= 20_000
    assert 0 < report.valid.bytes <= 8_000
    with pytest.raises(ValueError, match="raise them"):
        build_corpus(tmp_path / "tiny", max_train_bytes=10, max_valid_bytes=10, roots=[root])


def test_too_few_packages(tmp_path):
    write(tmp_path / "only" / "one.py", body("one"))
    with pytest.raises(ValueError, match="1 package"):
        build_corpus(tmp_path / "out", roots=[tmp_path], **BOUNDS)
    write(tmp_path / "two.py", body("two", 80))
    train, valid = split_by_package(find_sources([tmp_path]))
    assert [s.package for s in train] == ["two"]
    assert [s.package for s in valid] == ["only"]


def test_default_roots_hold_the_standard_library():
    assert any((root / "json" / "decoder.py").is_file() for root in corpus.default_roots())
