"""The GPU benchmark's page, its targets and its row, from results as if of a GPU."""

import copy

import pytest

from benchmarks import gpu_report
from benchmarks.gpu_report import GIB, Results

HERE = {
    "device": "NVIDIA H100 80GB HBM3",
    "Python": "3.12.1",
    "torch": "2.14.1",
    "CUDA": "13.0",
    "megatron-core": "0.19.2",
    "transformers": "5.24.0",
    "Transformer Engine": None,
    "commit": "abc1234",
}


def rank(plain: float, let: float, salt: float, teacher: dict[str, bool]) -> dict:
    """Three cycles; a peak as planned, of 30 GiB and 2 more for the teacher where it works."""
    modes = {"baseline": plain, "let": let, "salt": salt}
    return {
        "milliseconds": {mode: [x, 1.01 * x, 1.02 * x] for mode, x in modes.items()},
        "peak_bytes": dict.fromkeys(modes, 32 * GIB),
        "planned_bytes": {mode: (30 + 2 * teacher[mode]) * GIB for mode in modes},
        "teacher_bytes": 2 * GIB,
        "with_teacher": teacher,
        "waits": {
            "baseline": {"a.py:1 < b.py:2": 5},
            "let": {"a.py:1 < b.py:2": 5, "split.py:36 < x.py:9": 4},
            "salt": {"a.py:1 < b.py:2": 6},
        },
        "micro_batches": 4,
        "micro_batch_size": 4,
    }


def whole(milliseconds: float, mode: str) -> dict:
    return {
        "milliseconds": {mode: [milliseconds] * 3},
        "peak_bytes": {mode: 50 * GIB},
        "planned_bytes": {mode: 50 * GIB},
        "teacher_bytes": 0,
        "with_teacher": {mode: False},
        "micro_batches": 4,
        "micro_batch_size": 8,
        "tokens_per_step": 65536,
        "flops_per_token": 8.49e9,
    }


@pytest.fixture
def results() -> Results:
    first = {"baseline": False, "let": True, "salt": False}
    last = {"baseline": False, "let": False, "salt": True}
    found = {
        "tests": {"summary": "7 passed in 130.12s"},
        "7b rank 0 of 32": rank(900, 980, 900, first),
        "7b rank 31 of 32": rank(1000, 1000, 1200, last),
        "1.4b whole baseline": whole(1300, "baseline"),
        "1.4b whole let": whole(1350, "let"),
    }
    return Results(found, {})


def test_a_step_lasts_as_long_as_its_slowest_stage(results):
    assert gpu_report.recipe_overhead(results.ranks(), "let") == {"7b": pytest.approx(0)}
    assert gpu_report.recipe_overhead(results.ranks(), "salt") == {"7b": pytest.approx(0.2)}
    assert gpu_report.misses(results) == []


def test_missed_targets_are_named(results):
    slow = results.found["7b rank 0 of 32"]
    slow["milliseconds"]["let"] = [1050, 1060, 1070]
    slow["peak_bytes"]["baseline"] = 34 * GIB
    missed = gpu_report.misses(results)
    assert missed == [
        "7b: LET makes a step 5.0% longer, not 4%",
        "7b rank 0 of 32: the peak of plain is +6.7% off the plan",
    ]
    assert "2 targets missed" in gpu_report.page(results, missed, HERE)


def test_what_a_mode_would_hold_alone(results):
    """In turns the teacher lies in memory in the plain steps too."""
    found = results.found["7b rank 0 of 32"]
    held = {mode: gpu_report.peak_bytes(found, mode) / GIB for mode in found["peak_bytes"]}
    assert held == {"baseline": 30, "let": 32, "salt": 30}


def test_speed(results):
    """65,536 tokens in 1.3 s at 8.49 GFLOP each, of 989 TFLOP/s."""
    found = results.whole()["baseline"]
    assert gpu_report.tokens_per_second(found) == pytest.approx(50412, abs=1)
    assert gpu_report.mfu(found, HERE["device"]) == pytest.approx(0.4328, abs=1e-4)
    assert gpu_report.mfu(found, "another GPU") is None


def test_the_page_fits_a_screen(results):
    for number in (1, 2):  # more ranks than there are
        for name in list(results.ranks()):
            results.found[name.replace("7b", f"{number}.4b")] = copy.deepcopy(results.found[name])
    results.failed["tests"] = "RuntimeError: no end after 240 s, see runs/gpu/tests.log"
    page = gpu_report.page(results, gpu_report.misses(results), HERE).splitlines()
    assert len(page) <= 40 and max(map(len, page)) <= 110
    assert page[-1] == "gpu.py: failed: tests"
    assert any("24 x split.py:36 < x.py:9" in line for line in page)


def test_a_row_replaces_that_of_the_same_device_and_commit(results, tmp_path):
    path = tmp_path / "tested_on.md"
    head = "| date | device | software | commit | command | result |\n|---|---|---|---|---|---|\n"
    path.write_text(
        f"# Tested on\n\n{head}| 2026-11-26 | CPU | - | abc1234 | `make test` | green |\n\n"
    )
    path.write_text(path.read_text() + gpu_report.NO_GPU_YET)
    for summary in ("6 passed, 1 failed", "7 passed"):
        results.found["tests"]["summary"] = summary
        gpu_report.write_row(path, gpu_report.row(results, [], HERE))
    text = path.read_text()
    assert text.count("H100") == 1 and "6 passed" not in text and "7 passed" in text
    assert "make test" in text and gpu_report.NO_GPU_YET not in text
    lines = text.splitlines()
    assert [line.startswith("|") for line in lines[2:6]] == [True] * 4
