"""All layouts ranked by time."""

from dataclasses import replace

import pytest

from megatron_let.errors import UsageError
from megatron_let.planning.plan import candidates, plan, search
from megatron_let.planning.run import Gpu, Layout
from megatron_let.planning.shapes import student_shape


def test_a_layout_without_a_pipeline_that_fits_is_first(student, teacher, run_with):
    for method in ("baseline", "let", "salt"):
        best = search(student, teacher, Layout(gpus=32), run_with(method=method), Gpu())[0]
        assert (best.layout.tp, best.layout.pp, best.layout.recompute) == (1, 1, "none")
        assert best.run.micro_batch_size == 16


def test_none_that_fits_is_faster_than_the_first(student, teacher, run_with):
    """Tolerance: rounding."""
    gpu, run = Gpu(memory_gib=24), run_with(global_batch_size=64)
    best = search(student, teacher, Layout(gpus=16), run, gpu)
    assert best[0].given.run_seconds <= best[1].given.run_seconds
    for layout, rows in candidates(student, Layout(gpus=16), run):
        try:
            one = plan(student, teacher, layout, replace(run, micro_batch_size=rows), gpu, ())
        except UsageError:
            continue
        if one.fits:
            assert one.given.run_seconds >= best[0].given.run_seconds * (1 - 1e-5)


def test_memory_decides_what_a_large_student_needs(run_with):
    llama = student_shape("70b", vocab_size=128256)
    run = run_with(method="baseline", seq_length=8192)
    best = search(llama, None, Layout(gpus=64), run, Gpu())
    assert all(one.fits and one.layout.tp == 8 for one in best)
    with pytest.raises(UsageError, match="8 GPUs with 80 GiB holds it: the smallest needs 1[0-9]"):
        search(llama, None, Layout(gpus=8), run, Gpu())


def test_each_layout_has_the_padding_of_its_own(run_with):
    """Rows that TP does not divide are as many as the tokens, or fixed."""
    odd = student_shape("7b", vocab_size=50257)
    run, small = run_with(method="baseline"), Gpu(memory_gib=24)
    padded = search(odd, None, Layout(gpus=8), run, small, 1)[0]
    assert (padded.layout.tp, padded.student.vocab_size) == (4, 50260)
    assert search(odd, None, Layout(gpus=8), run, small)[0].layout.tp == 1


def test_what_no_layout_mends_is_said(student, teacher, run_with):
    with pytest.raises(UsageError, match="--global-batch-size 512 is not a multiple of .* 31"):
        search(student, teacher, Layout(gpus=31), run_with(), Gpu())
    with pytest.raises(UsageError, match="--method let needs a teacher"):
        search(student, None, Layout(gpus=32), run_with(method="let"), Gpu())


def test_context_parallelism_shares_activations_and_optimizer(student, teacher, run_with):
    run = run_with(micro_batch_size=1)
    one, two = (plan(student, teacher, Layout(gpus=8, cp=cp), run).memory[0] for cp in (1, 2))
    assert two.weights == one.weights and two.optimizer == one.optimizer
    assert two.activations == one.activations / 2
    with pytest.raises(UsageError, match="--seq-length 2050 does not divide"):
        plan(student, teacher, Layout(gpus=8, cp=2), run_with(seq_length=2050))
