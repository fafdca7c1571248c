import pytest

from megatron_let.errors import UsageError
from megatron_let.planning.run import Gpu, Layout


@pytest.mark.parametrize(
    "method, phases",
    [
        ("baseline", [(1000, False, False)]),
        ("let", [(100, True, False), (900, False, False)]),
        ("salt", [(173, False, True), (827, False, False)]),
        ("reverse-kd", [(1000, False, True)]),
        ("let+salt", [(100, True, True), (73, False, True), (827, False, False)]),
    ],
)
def test_phases(run_with, method, phases):
    run = run_with(method=method, train_iters=1000, let_stop_step=100)
    assert list(run.phases()) == phases


def test_stops_may_be_given(run_with):
    run = run_with(method="let+salt", train_iters=100, let_stop_step=100, kd_stop_step=40)
    assert list(run.phases()) == [(40, True, True), (60, True, False)]


def test_micro_batches(run_with, layout):
    assert run_with().micro_batches(layout) == 16
    with pytest.raises(UsageError, match="500 is not a multiple of .* 4 x 8 .* Choose 512"):
        run_with(global_batch_size=500).micro_batches(layout)


def test_virtual_chunks_need_a_multiple_of_the_stages(run_with):
    with pytest.raises(UsageError, match="gives 6. Choose a multiple of 128, or --vpp 1"):
        run_with(global_batch_size=192).micro_batches(Layout(gpus=32, pp=4, vpp=2))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "distil"}, "--method distil is unknown. Choose baseline, let"),
        ({"seq_length": 0}, "--seq-length 0 must be at least 1"),
        ({"train_iters": 1000}, "--let-stop-step 1500 is outside the run of 1000 steps"),
        ({"let_stop_step": 0}, "--let-stop-step 0"),
        ({"teacher_seq_length": 0}, "--teacher-seq-length 0 has no effect"),
        ({"teacher_seq_length": 9, "method": "salt"}, "9 has no effect with --method salt"),
        ({"method": "salt", "kd_stop_step": 20000}, "--kd-stop-step 20000"),
    ],
)
def test_impossible_runs(run_with, changes, message):
    with pytest.raises(UsageError, match=message):
        run_with(**changes)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"mfu": 1.4}, "--mfu 1.4 is a share of the peak"),
        ({"mfu": 0.0}, "--mfu 0.0 must be positive"),
        ({"peak_tflops": float("nan")}, "--gpu-peak-tflops nan must be positive"),
    ],
)
def test_impossible_gpus(values, message):
    with pytest.raises(UsageError, match=message):
        Gpu(**values)
