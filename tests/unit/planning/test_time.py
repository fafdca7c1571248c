from dataclasses import replace

import pytest

from megatron_let.planning.run import Gpu, Layout
from megatron_let.planning.time import split_time, student_work

LAYER, HEAD = 109_576_192, 201_326_592  # FLOPs of a forward pass per token, see test_flops.py
TEACHER = 283_115_520
BATCH_TOKENS = 4 * 2048


@pytest.fixture
def time_of(student, teacher):
    def make(layout, run):
        return split_time(student, teacher, layout, run, Gpu())

    return make


def test_work_of_the_stages(student, layout, run_with):
    work = student_work(student, layout, run_with())
    layers, head = BATCH_TOKENS * 6 * LAYER, BATCH_TOKENS * HEAD
    assert work.forward == ((layers,),) * 3 + ((layers + head,),)
    assert work.stages[0] == BATCH_TOKENS * 3 * 6 * LAYER
    full = student_work(student, replace(layout, recompute="full"), run_with())
    assert full.stages[3] == BATCH_TOKENS * (4 * 6 * LAYER + 3 * HEAD)


def test_a_stages_work_passes_at_the_given_share_of_the_peak(time_of, layout, run_with):
    """Tolerance: rounding."""
    seconds = 8_493_465_600 * 512 * 2048 / (32 * 312e12 * 0.4)
    alone = time_of(Layout(gpus=32), run_with())
    assert alone.plain_seconds == pytest.approx(seconds, rel=1e-9)
    assert alone.plain_mfu == pytest.approx(0.4, rel=1e-9)
    # Tensor and context parallelism share a micro-batch; a pipeline waits, and for its slowest.
    shared = time_of(Layout(gpus=32, tp=2, cp=2), run_with())
    assert shared.plain_seconds == pytest.approx(seconds, rel=1e-9)
    piped = time_of(layout, run_with())
    assert piped.plain_seconds > 19 / 16 * seconds
    assert piped.plain_mfu == pytest.approx(0.4 * seconds / piped.plain_seconds, rel=1e-9)


def test_on_one_stage_the_overhead_is_the_flops(time_of, run_with):
    """Tolerance: rounding."""
    time = time_of(Layout(gpus=8), run_with())
    assert time.guided_overhead == pytest.approx(TEACHER / 8_493_465_600, rel=1e-9)
    assert time.run_overhead == pytest.approx(time.guided_overhead * 1500 / 19073, rel=1e-9)
    # Dealt over tensor-parallel ranks it stays the same share; repeated on each it would not.
    dealt = time_of(Layout(gpus=8, tp=4), run_with(micro_batch_size=1))
    assert dealt.guided_overhead == pytest.approx(time.guided_overhead, rel=1e-9)


def test_the_teacher_is_on_the_stage_of_its_layer(time_of, layout, run_with):
    time = time_of(layout, run_with(let_layer=7))
    extra = [
        guided - plain for guided, plain in zip(time.guided_work, time.plain_work, strict=True)
    ]
    assert extra == [0, BATCH_TOKENS * TEACHER, 0, 0] and time.teacher_stages == (1,)


def test_methods_that_need_logits(time_of, layout, run_with):
    teacher_head = 2 * 576 * 49152
    for method, places in (("salt", (3,)), ("let+salt", (0, 3))):
        time = time_of(layout, run_with(method=method))
        assert time.teacher_stages == places
        extra = time.guided_work[3] - time.plain_work[3]
        assert extra == BATCH_TOKENS * (TEACHER + teacher_head)
    # One stage runs the teacher once for both.
    both = time_of(Layout(gpus=8), run_with(method="let+salt"))
    assert both.guided_work[0] - both.plain_work[0] == BATCH_TOKENS * (TEACHER + teacher_head)
    assert len(both.phase_seconds) == 3 and both.phase_seconds[2] == both.plain_seconds


def test_where_the_teacher_shortens_nothing_it_costs_more_than_the_floor(time_of, run_with):
    """Stage 0 is the slowest with 9 layers; all stages wait for its teacher."""
    uneven = time_of(Layout(gpus=32, pp=4, first_stage_layers=9), run_with())
    assert uneven.guided_overhead > 2 * TEACHER / 8_493_465_600
    even = time_of(Layout(gpus=32, pp=4), run_with())
    # With 6 the last stage is, with the LM head, and the teacher hides behind it.
    assert 0 < even.guided_overhead < TEACHER / 8_493_465_600
