"""After the stop step the teacher is gone, and at least 90 % of its bytes are back."""

import pytest

from tests.support.testing import run_distributed

METHODS = {
    "let": "--method let --let-layer 2 --let-decay step --let-stop-step 1 --teacher-model",
    "salt": "--method salt --kd-stop-step 1 --teacher-model",
}


@pytest.fixture(scope="module")
def big_teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("big") / "teacher"
    [num_bytes] = run_distributed("tests.distributed.memory:save_big_teacher", 1, folder)
    assert num_bytes >= 200e6
    return folder, num_bytes


def release(folder, method="let", keep_a_reference=False):
    flags = [*METHODS[method].split(), str(folder)]
    return run_distributed("tests.distributed.memory:release", 1, flags, keep_a_reference)[0]


@pytest.mark.parametrize("method", METHODS)
def test_memory_is_back(big_teacher, method):
    folder, num_bytes = big_teacher
    found = release(folder, method)
    print(found)
    assert not found["lives"]
    assert found["taken"] >= 0.9 * num_bytes, "the measurement sees the teacher"
    assert found["back"] >= 0.9 * num_bytes


def test_a_reference_that_is_kept_is_seen(big_teacher):
    folder, num_bytes = big_teacher
    found = release(folder, keep_a_reference=True)
    assert found["lives"] and found["back"] < 0.1 * num_bytes
