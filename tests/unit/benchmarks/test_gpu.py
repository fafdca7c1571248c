"""The GPU benchmark's parts: each by itself, kept, and none that stops the others."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.recipes import recipe_flags, without
from megatron_let.planning.shapes import TEACHERS

HERE = {"device": "a device", "commit": "abc1234", "bytes": 0, "Transformer Engine": None}


def test_a_failed_part_shows_its_last_words(tmp_path):
    with pytest.raises(RuntimeError, match=r"ValueError: out of luck \(.*log\)"):
        gpu.run_logged(["-c", "raise ValueError('out of luck')"], {}, tmp_path / "log", 60)


def test_a_part_that_hangs_ends_with_all_that_it_started(tmp_path):
    sleeper = "import time; time.sleep(600)"
    program = (
        f"import subprocess, sys, time; c = subprocess.Popen([sys.executable, '-c', {sleeper!r}])"
    )
    program += f"; open({str(tmp_path / 'pid')!r}, 'w').write(str(c.pid)); time.sleep(600)"
    with pytest.raises(RuntimeError, match="no end after 5 s"):
        gpu.run_logged(["-c", program], {}, tmp_path / "log", 5)
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or _is_dead(child):
            return
        time.sleep(0.05)
    pytest.fail("what the part started lives on")


def _is_dead(pid: int) -> bool:
    return "Z" in Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0]


def test_a_failed_part_does_not_stop_the_others(tmp_path):
    place = gpu.Place(tmp_path, HERE, smoke=True)
    impossible = gpu.Part("0b rank 7 of 8", 60, "0b", 8, 7)
    tests = gpu.Part("tests", 60)
    results = gpu.run_parts([impossible, tests], place, minutes=0)
    assert set(results.failed) == {"0b rank 7 of 8", "tests"}
    assert "the time is up" in results.failed["tests"]
    (tmp_path / "tests.json").write_text('{"here": {"device": "another"}, "found": {}}')
    assert gpu.known(tmp_path / "tests.json", HERE) is None
    results = gpu.run_parts([impossible], place, minutes=1)
    assert "FileNotFoundError" in results.failed["0b rank 7 of 8"]


def test_the_batch_fits_the_memory_and_the_time(tmp_path):
    """7 B on 80 GiB as the recipe has it, with 4 of 16 micro-batches; on 24 GiB with fewer rows."""
    teacher = tmp_path / "llama-3.2-1b"
    teacher.mkdir()
    (teacher / "config.json").write_text(json.dumps(TEACHERS[teacher.name]))
    flags = recipe_flags("7b", "baseline", str(teacher), tmp_path)
    flags = without(flags, lambda flag: flag == "--method")
    rows = {}
    for gib in (80, 24):
        here = HERE | {"bytes": gib * 1024**3, "Transformer Engine": "2.9"}
        place = gpu.Place(tmp_path, here, smoke=False)
        batch = gpu.fitted(flags, gpu.Part("7b rank 0 of 32", 1, "7b", 32, 0), place)
        rows[gib] = dict(zip(batch[::2], batch[1::2], strict=True))
    assert rows[80] == {"--micro-batch-size": "4", "--global-batch-size": "128"}
    assert rows[24]["--micro-batch-size"] in ("1", "2")


def test_without_a_gpu_it_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 2 and "--cpu-smoke" in capsys.readouterr().err
    assert not os.listdir(tmp_path)
