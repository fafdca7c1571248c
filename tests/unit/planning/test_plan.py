import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_let.errors import UsageError
from megatron_let.planning.plan import plan
from megatron_let.planning.run import Gpu, Layout
from megatron_let.planning.shapes import student_shape, teacher_shape
from megatron_let.planning.time import split_time


def test_imports_neither_torch_nor_megatron():
    code = "import sys, megatron_let.planning.text; print({'torch', 'megatron'} & {*sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


def test_the_papers_run(student, teacher, layout, run_with):
    """Tolerance: rounding."""
    paper = plan(student, teacher, layout, run_with())
    assert paper.overhead_floor == pytest.approx(283_115_520 / 8_493_465_600, rel=1e-12)
    assert paper.fits and paper.suggested_fits and paper.fullest_stage == 0
    assert paper.given.teacher_stages == (0,)


def test_suggests_the_split_with_the_shortest_run(student, teacher, layout, run_with):
    paper = plan(student, teacher, layout, run_with())
    # The LM head weighs 1.8 layers: the last stage should have fewer.
    assert paper.suggested.layers == (7, 7, 7, 3)
    assert paper.suggested.run_seconds < 0.95 * paper.given.run_seconds
    # Guided to the end, the first stage should give up layers for the teacher.
    whole = plan(student, teacher, layout, run_with(let_stop_step=19073))
    assert whole.suggested.layers[0] < 7


def test_no_other_split_is_worth_its_flags_more(student, teacher, layout, run_with):
    run = run_with()
    paper = plan(student, teacher, layout, run)

    def time(split):
        return split_time(student, teacher, split, run, Gpu())

    def price(split):
        return time(split).run_seconds * (1 + 0.005 * split.split_flags.count("--"))

    splits = list(layout.splits(student.num_layers))
    assert min(splits, key=price) == paper.suggested.layout


def test_nothing_gained_keeps_the_given_split(student, teacher, run_with):
    good = Layout(gpus=32, pp=4, last_stage_layers=3)
    assert plan(student, teacher, good, run_with()).suggested.layout == good
    single = plan(student, teacher, Layout(gpus=8), run_with())
    assert single.suggested == single.given


def test_a_split_that_does_not_fit_is_not_suggested(student, teacher, layout, run_with):
    needed = plan(student, teacher, layout, run_with()).memory[0].total / 1024**3
    # Enough for 6 layers on the first stage, not for 7.
    tight = plan(student, teacher, layout, run_with(), Gpu(memory_gib=needed + 0.1))
    assert tight.fits and tight.suggested.layers[0] <= 6
    tighter = plan(student, teacher, layout, run_with(), Gpu(memory_gib=needed - 0.1))
    assert not tighter.fits and tighter.suggested_fits and tighter.suggested.layers[0] < 6
    hopeless = plan(student, teacher, layout, run_with(), Gpu(memory_gib=1))
    assert not hopeless.fits and not hopeless.suggested_fits


def test_the_baseline_ignores_a_teacher(student, teacher, layout, run_with):
    run = run_with(method="baseline")
    with_one, without = plan(student, teacher, layout, run), plan(student, None, layout, run)
    assert with_one == without and without.teacher is None
    assert without.overhead_floor == 0 and without.given.run_overhead == 0


def test_the_floor_counts_each_stage_that_runs_the_teacher(student, teacher, layout, run_with):
    body, head = 283_115_520, 2 * 576 * 49152
    both = plan(student, teacher, layout, run_with(method="let+salt"))
    assert both.teacher_flops_per_token == 2 * body + head
    single = plan(student, teacher, Layout(gpus=8), run_with(method="let+salt"))
    assert single.teacher_flops_per_token == body + head


def test_the_large_students_need_more_than_one_gpu(run_with):
    llama = teacher_shape("llama-3.2-1b")
    student = student_shape("7b", vocab_size=128256)
    assert not plan(student, llama, Layout(gpus=8), run_with()).fits
    assert plan(student, llama, Layout(gpus=64, tp=4, pp=2), run_with()).fits


@pytest.mark.parametrize(
    "flags, changes, message",
    [
        ({"gpus": 96, "tp": 3}, {"global_batch_size": 1024}, "--num-attention-heads 16 does not"),
        ({"gpus": 8}, {"let_layer": 25}, "--let-layer 25 is outside .* choose 1 to 24"),
        ({"gpus": 8}, {"let_layer": 0}, "--let-layer 0"),
        ({"gpus": 10, "pp": 5}, {}, "24 layers do not divide over 5"),
        ({"gpus": 64}, {"global_batch_size": 500}, "--global-batch-size 500"),
        ({"gpus": 8, "tp": 2}, {"seq_length": 2047}, "--seq-length 2047 does not divide"),
    ],
)
def test_what_megatron_would_refuse(student, teacher, run_with, flags, changes, message):
    with pytest.raises(UsageError, match=message):
        plan(student, teacher, Layout(**flags), run_with(**changes))


def test_a_method_needs_its_teacher(student, layout, run_with):
    with pytest.raises(UsageError, match="--method let needs a teacher"):
        plan(student, None, layout, run_with())


def test_an_odd_vocabulary_or_number_of_groups(student, teacher, run_with):
    with pytest.raises(UsageError, match="padded vocabulary 50257"):
        plan(replace(student, vocab_size=50257), teacher, Layout(gpus=8, tp=2), run_with())
    grouped = replace(student, num_attention_heads=24, num_query_groups=3, ffn_hidden_size=5376)
    with pytest.raises(UsageError, match="--num-query-groups 3"):
        plan(grouped, teacher, Layout(gpus=8, tp=8), run_with())
