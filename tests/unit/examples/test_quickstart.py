"""What the quickstart asks for before it trains, and how it goes on."""

import importlib.util
import json

import pytest

from megatron_let.quickstart.run import is_finished, need
from tests.unit.report.conftest import start_line, valid_line


@pytest.mark.parametrize("text", [None, "", '{"kind": "sta', '{"kind": "start", "iteration": 0}\n'])
def test_a_run_without_a_readable_record_is_not_finished(text, tmp_path):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    assert not is_finished(tmp_path)


def test_a_run_without_its_last_save_is_not_finished(tmp_path, monkeypatch):
    lines = start_line(train_iters=4), valid_line(4, 1.0)
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert not is_finished(tmp_path)
    (tmp_path / "iter_0000004").mkdir()  # half of one
    assert not is_finished(tmp_path)
    monkeypatch.setattr("megatron_let.quickstart.run.find_checkpoint", lambda save, step: save)
    assert is_finished(tmp_path)


def test_what_the_end_needs_is_asked_for_at_the_start(monkeypatch):
    need("plot", "json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"needs gguf: pip install .*\[gguf\]"):
        need("gguf", "gguf")
