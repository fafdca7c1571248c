"""Data that cannot be trained on, or that a stranger wrote: a sentence before the first step."""

import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_let.data.indexed import PairWriter, write_index
from tests.distributed.training import run
from tests.support.testing import run_program
from tests.support.tiny_run import FLAGS, VOCAB

ROOT = Path(__file__).resolve().parents[2]


def write_pair(prefix: Path, documents: list[list[int]]) -> None:
    """Write a dataset without a sidecar."""
    writer = PairWriter(prefix)
    ids = np.array([token for document in documents for token in document], np.int32)
    writer.add(ids, np.array([len(document) for document in documents], np.int32))
    writer.close()
    write_index(prefix, np.int32)


def train(corpus, folder: Path, flags: str = "") -> str | None:
    """Train two steps on `folder`/data; return the usage error."""
    own = ["--data-path", str(folder / "data"), "--data-cache-path", str(folder / "cache")]
    own += "--split 100,0,0 --eval-iters 0 --train-iters 2".split()
    return run(1, *corpus.flags, *own, *flags.split())


TEXT = [list(range(1, 60)) * 4] * 4
LACKING = {
    "one document of three tokens": ([[1, 2, 3]], "data holds 3 tokens for train, .*--seq-length"),
    "a token less than a sample": ([[1] * 16], "data holds 16 tokens for train"),
    "only empty documents": ([[]] * 5, "^/.*data holds no token: leave it out"),
    "no document": ([], "data holds no token: leave it out"),
    "an id beyond the vocabulary": ([*TEXT, [VOCAB]], f"data has the token id {VOCAB}, .* {VOCAB}"),
    "ids far beyond it": ([[10**9] * 50], "data has the token id 1000000000, and the model"),
}


@pytest.mark.parametrize("kind", LACKING)
def test_data_that_cannot_be_trained_on_is_named(kind, corpus, tmp_path):
    documents, told = LACKING[kind]
    write_pair(tmp_path / "data", documents)
    error = train(corpus, tmp_path)
    assert error and re.search(told, error), error
    assert len(error.splitlines()) == 1


def test_a_batch_without_a_token_that_counts_is_named(corpus, tmp_path):
    write_pair(tmp_path / "data", [[0] * 400])  # w0 is the end of a document
    error = train(corpus, tmp_path, "--eod-mask-loss")
    assert error and error.startswith("No token of the first 8 samples counts in the loss"), error
    assert not train(corpus, tmp_path)


def test_an_id_far_behind_is_named_when_it_comes(corpus, tmp_path):
    """Only the first million is looked at before the first step."""
    write_pair(tmp_path / "data", [[1] * (1 << 20), [VOCAB + 3] * (1 << 21)])
    error = train(corpus, tmp_path)
    assert error and f"The data has the token id {VOCAB + 3}, and the model" in error


# --- damaged and hostile files ------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "[" * 10**5, None])
@pytest.mark.parametrize("flag", ["--per-dataset-sequences-path", "--per-split-data-args-path"])
def test_a_list_of_data_that_is_none_is_named(flag, text, corpus, tmp_path):
    path = tmp_path / "list.json"
    if text is not None:
        path.write_text(text)
    data = corpus.flags[: corpus.flags.index("--split")] if "sequences" in flag else []
    rest = corpus.flags[corpus.flags.index("--data-cache-path") :]
    error = run(1, *data, *rest, flag, str(path))
    assert error and f"{flag} {path} cannot be read: " in error, error


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {
    "index cut": (".idx", cut, "data.idx has .* bytes and should have"),
    "index empty": (".idx", lambda path: os.truncate(path, 0), "data.idx is no index"),
    "index a page": (".idx", lambda path: path.write_text("<html>" * 20), "data.idx is no index"),
    "tokens cut": (".bin", cut, "data.bin has .* bytes and data.idx speaks of"),
    "sidecar cut": (".json", lambda path: path.write_text('{"tok'), "data.json is damaged"),
    "sidecar a list": (".json", lambda path: path.write_text("[]"), "data.json is damaged"),
    "sidecar nested": (".json", lambda path: path.write_text("[" * 10**5), "data.json is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_data_is_named(kind, corpus, tmp_path):
    suffix, damage, told = DAMAGES[kind]
    write_pair(tmp_path / "data", TEXT)
    damage(tmp_path / f"data{suffix}")
    error = train(corpus, tmp_path)
    assert error and re.search(told, error), error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("suffix", [".idx", ".bin", ".json"])
def test_a_pickle_in_any_file_of_the_data_executes_nothing(suffix, corpus, tmp_path):
    write_pair(tmp_path / "data", TEXT)
    (tmp_path / f"data{suffix}").write_bytes(pickle.dumps(Calls(tmp_path / "made")))
    error = train(corpus, tmp_path)
    assert error and f"data{suffix}" in error, error
    assert not (tmp_path / "made").exists()


class Calls:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_among_the_cached_indices_executes_nothing(corpus, tmp_path):
    write_pair(tmp_path / "data", TEXT)
    for name in ("two", "one"):
        shutil.copy(tmp_path / "data.bin", tmp_path / f"{name}.bin")
        shutil.copy(tmp_path / "data.idx", tmp_path / f"{name}.idx")
    blend = f"--data-path 1 {tmp_path}/one 1 {tmp_path}/two"
    assert not train(corpus, tmp_path, blend)
    indices = sorted((tmp_path / "cache").glob("*.npy"))
    kinds = {path.stem.split("-")[-1] for path in indices}
    assert len(kinds) == 5, kinds  # of documents, samples, the shuffle; of the blend two
    for path in indices:
        whole = path.read_bytes()
        path.write_bytes(pickle.dumps(Calls(tmp_path / "made")))
        error = train(corpus, tmp_path, blend)
        assert error and f"{path.name} is no index of samples" in error, (path, error)
        assert len(error.splitlines()) == 1
        path.write_bytes(whole)
    assert not (tmp_path / "made").exists()
    cut(path)
    assert f"{path.name} is no index of samples" in (train(corpus, tmp_path, blend) or "")
    path.write_bytes(pickle.dumps(Calls(tmp_path / "made")))
    np.load(path, allow_pickle=True)  # the twin: the payload works
    assert (tmp_path / "made").exists()


def test_a_cache_that_cannot_be_written_is_named(corpus, tmp_path):
    write_pair(tmp_path / "data", TEXT)
    (tmp_path / "cache").touch()
    error = train(corpus, tmp_path)
    assert error and re.search("cannot be written .*/cache.*--data-cache-path", error), error


def test_the_sentence_is_what_a_user_sees(corpus, tmp_path):
    write_pair(tmp_path / "data", [[1, 2, 3]])
    argv = [*FLAGS, *corpus.flags, "--data-path", str(tmp_path / "data"), "--eval-iters", "0"]
    result = run_program(str(ROOT / "pretrain_let.py"), *argv, "--split", "100,0,0")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "pretrain_let.py: error: " in result.stderr.splitlines()[-1]
