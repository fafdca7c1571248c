"""A preprocessing run that is killed and called again gives the bytes of one that was not."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from megatron_let.data import preprocess as module
from megatron_let.data import sources, stream, workplace
from megatron_let.data.preprocess import WAYS, PreprocessConfig, preprocess
from tests.unit.data.test_preprocess import make_records, save_tokenizer

SUBSETS = ["Pile-CC", "Wikipedia (en)", "Books3"]
FORK = multiprocessing.get_context("fork")


def write_inputs(folder: Path, documents: int) -> tuple[str, ...]:
    """Three files with subsets, two keys, and lines that are no documents."""
    import zstandard

    folder.mkdir()
    records = make_records(documents)
    lines = []
    for number, record in enumerate(records):
        record["meta"] = {"pile_set_name": SUBSETS[number % 7 % 3]}
        lines.append("{broken" if number % 50 == 49 else json.dumps(record))
    third = len(lines) // 3
    parts = [("\n".join(lines[i : i + third]) + "\n").encode() for i in range(0, len(lines), third)]
    for index, part in enumerate(parts):
        packed = index == 1
        name = f"{index}.jsonl" + ".zst" * packed
        (folder / name).write_bytes(zstandard.compress(part) if packed else part)
    return (str(folder),)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.setattr(stream, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 5_000)
    return {
        "input": write_inputs(tmp_path / "in", 2000),
        "tokenizer_model": save_tokenizer(tmp_path / "tokenizer"),
        "json_keys": ("text", "title"),
        "split_by_meta": "pile_set_name",
        "on_error": "skip",
        "append_eod": True,
        "workers": 2,
        "output_prefix": str(tmp_path / "out" / "pile"),
    }


def made(folder: Path) -> dict[str, bytes]:
    """The content of all files; of a sidecar what does not depend on where it lies."""
    found = {}
    for path in sorted(folder.iterdir()):
        found[path.name] = path.read_bytes()
        if path.suffix == ".json":
            record = json.loads(path.read_text())
            del record["arguments"]
            found[path.name] = json.dumps(record).encode()
    return found


def killed_after(seconds: float, config: dict[str, object]) -> bool:
    """Run in a process of its own and kill it; False where it was done before."""
    process = FORK.Process(target=preprocess, args=(PreprocessConfig(**config),))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    "kills",
    [3, pytest.param(20, marks=pytest.mark.slow)],
)
def test_killed_at_random_instants(tmp_path: Path, config: dict[str, object], kills: int) -> None:
    out = tmp_path / "out"
    out.mkdir()
    start = time.monotonic()
    preprocess(PreprocessConfig(**config))
    duration = time.monotonic() - start
    expected = made(out)
    assert len(expected) == 3 * 2 * 3 + 1 + 2  # subsets x keys x files, skipped records, blends
    dice = random.Random(kills)
    happened = 0
    while happened < kills:
        shutil.rmtree(out)
        out.mkdir()
        for _ in range(3):  # one run killed several times
            if not killed_after(dice.uniform(0.05, 0.7) * duration, config):
                break
            happened += 1
            is_partial = (out / "pile.partial").exists()  # also between its last moves
            assert is_partial or made(out) in ({}, expected), "half a result"
        if (out / "pile.partial").exists() or not (out / "pile_text_blend.txt").exists():
            preprocess(PreprocessConfig(**config))
        assert made(out) == expected


def test_interrupted_between_two_moves(
    tmp_path: Path, config: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    preprocess(PreprocessConfig(**config))
    expected = made(out)
    for moves in (0, 1, 13, 20):
        shutil.rmtree(out)
        out.mkdir()
        rename, done = os.rename, []

        def stop_after(source: Path, target: str) -> None:
            if len(done) == moves:  # noqa: B023
                raise KeyboardInterrupt
            done.append(target)  # noqa: B023
            rename(source, target)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", stop_after)
            with pytest.raises(KeyboardInterrupt):
                preprocess(PreprocessConfig(**config))
        complete = [path for path in out.glob("*.idx")]
        assert all(path.with_suffix(".bin").exists() for path in complete)
        preprocess(PreprocessConfig(**config))
        assert made(out) == expected


def test_resumed_with_skip_behind_a_bad_record(tmp_path: Path, config: dict[str, object]) -> None:
    """What was done is kept when a record stops a run, and goes on when it may be left out."""
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"0.jsonl:50: not a JSON .*--on-error skip") as stopped:
        preprocess(PreprocessConfig(**config | {"on_error": "stop"}))
    assert "pile.partial" not in str(stopped.value)
    prefixes = preprocess(PreprocessConfig(**config))
    assert len(prefixes) == 6


def test_a_name_that_clashes_leaves_no_half_block(
    tmp_path: Path, config: dict[str, object]
) -> None:
    """The call that follows must not write the block's first documents twice."""
    (tmp_path / "out").mkdir()
    lines = [
        {"text": f"fox {n}", "title": "x", "meta": {"pile_set_name": "a b"}} for n in range(4000)
    ]
    lines[-1]["meta"] = {"pile_set_name": "a-b"}
    source = tmp_path / "clash.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config["input"] = (str(source),)
    for _ in range(2):
        with pytest.raises(ValueError, match="would share the name"):
            preprocess(PreprocessConfig(**config))
        state = json.loads((tmp_path / "out" / "pile.partial" / "state.json").read_text())
        done = state["counts"]["a-b_text_document"]["documents"]
        assert done == state["position"]["records"]
        assert 0 < done < 4000
        assert state["sizes"]["a-b_text_document"][".lengths"] == 4 * done


@pytest.mark.parametrize(
    "change, message",
    [
        ({"append_eod": False}, "holds an interrupted run with another append_eod"),
        ({"json_keys": ("text",)}, "holds an interrupted run with another json_keys"),
        ({"tokenizer_hf_no_use_fast": True}, "with another tokenizer_hf_no_use_fast"),
    ],
)
def test_another_run_does_not_go_on(
    tmp_path: Path,
    config: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, object],
    message: str,
) -> None:
    (tmp_path / "out").mkdir()
    interrupted(config, monkeypatch)
    with pytest.raises(ValueError, match=message):
        preprocess(PreprocessConfig(**config | change))
    file = tmp_path / "out" / "pile.partial" / "state.json"
    state = json.loads(file.read_text())
    for name in WAYS:  # which an older version did not note
        del state["identity"][name]
    file.write_text(json.dumps(state))
    preprocess(PreprocessConfig(**config))


def test_another_end_of_documents_does_not_go_on(
    tmp_path: Path, config: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    interrupted(config, monkeypatch)
    file = tmp_path / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "a"}))
    with pytest.raises(ValueError, match="an interrupted run with another eod_id"):
        preprocess(PreprocessConfig(**config))


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", lockf)
    workplace.Workplace(str(tmp_path / "x"), {}, "auto").close()
    assert not (tmp_path / "x.partial").exists()


def test_an_input_that_changed_is_refused(
    tmp_path: Path, config: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    interrupted(config, monkeypatch)
    with open(tmp_path / "in" / "2.jsonl", "a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match=r"run with another input \(\['[^']*2.jsonl"):
        preprocess(PreprocessConfig(**config))


def test_two_processes_do_not_write_the_same(tmp_path: Path, config: dict[str, object]) -> None:
    (tmp_path / "out").mkdir()
    process = FORK.Process(target=preprocess, args=(PreprocessConfig(**config),))
    process.start()
    while not (tmp_path / "out" / "pile.partial" / "lock").exists():
        time.sleep(0.001)
    time.sleep(0.05)
    with pytest.raises(ValueError, match="another process is writing"):
        preprocess(PreprocessConfig(**config))
    process.join()
    assert process.exitcode == 0


def test_a_full_disk_leaves_what_was_done(
    tmp_path: Path, config: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    preprocess(PreprocessConfig(**config))
    expected = made(out)
    shutil.rmtree(out)
    out.mkdir()
    interrupted(config, monkeypatch, OSError(28, "No space left on device"))
    assert [path.name for path in out.iterdir()] == ["pile.partial"]
    preprocess(PreprocessConfig(**config))
    assert made(out) == expected


def interrupted(
    config: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException = KeyboardInterrupt(),  # noqa: B008
) -> None:
    """Leave a run behind that has written some blocks."""
    add, calls = stream.PairWriter.add, []

    def stop(self: object, *documents: object) -> None:
        calls.append(0)
        if len(calls) == 20:
            raise error
        add(self, *documents)

    with monkeypatch.context() as patch:
        patch.setattr(stream.PairWriter, "add", stop)
        with pytest.raises(type(error)):
            module.preprocess(PreprocessConfig(**config))
