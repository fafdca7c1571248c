"""Megatron's formulas with numbers put in by hand; exact terms, so equality is asked for."""

from dataclasses import replace

import pytest

from megatron_let.planning.run import Layout
from tests.unit.planning import megatron_report as report

SHORT = {"seq_length": 1024, "micro_batch_size": 2}


def test_weights_and_optimizer(gelu_student):
    # 8 x 12 x 1024^2 / 2 stages + 32768 x 1024, over 2 ranks; norms (8 x 4 + 2) x 1024 / 2 stages.
    parameters = (50_331_648 + 33_554_432) / 2 + 17_408
    layout = Layout(gpus=8, tp=2, pp=2)
    assert report.weight_and_optimizer_bytes(gelu_student, layout) == parameters * (6 + 12 / 2)
    plain = replace(layout, distributed_optimizer=False)
    assert report.weight_and_optimizer_bytes(gelu_student, plain) == parameters * 18


def test_an_untied_head_counts_on_a_single_stage(student):
    # Two tables of 2048 x 49152, all norms.
    layout = Layout(gpus=8)
    assert report.weight_and_optimizer_bytes(student, layout) == student.parameters * 7.5
    on_four = report.weight_and_optimizer_bytes(student, Layout(gpus=32, pp=4))
    one_table = student.parameters - student.embedding_parameters
    layers = one_table - student.embedding_parameters
    assert on_four == (layers / 4 + student.embedding_parameters) * 7.5


def test_activations_with_sequence_parallelism(gelu_student, run_with):
    layout = Layout(gpus=4, tp=2, pp=2, recompute="selective")
    run = run_with(**SHORT, global_batch_size=2)
    # 1024 x 2 x 1024 x (18 + 16) x 8 layers + 2 x 1024 x 2 x (8 + 1024), one micro-batch for two
    # stages, two ranks.
    expected = (570_425_344 + 32_768 + 4_194_304) / 2 / 2
    assert report.activation_bytes(gelu_student, layout, run) == expected
    # One stage: no discount, and 4 x 1024 x 2 x (1024 + 32768) for the loss.
    single = Layout(gpus=2, tp=2, recompute="selective")
    expected = (570_425_344 + 16_384 + 2_097_152 + 276_824_064) / 2
    assert report.activation_bytes(gelu_student, single, run) == expected


def test_activations_without_sequence_parallelism(gelu_student, run_with):
    layout = Layout(gpus=4, tp=2, pp=2, recompute="selective", sequence_parallel=False)
    run = run_with(**SHORT, global_batch_size=2)
    # 1024 x 2 x 1024 x (10 + 24 / 2) x 8 layers + the embedding, and 5 %; tolerance: rounding.
    expected = 1.05 * (369_098_752 + 32_768 + 4_194_304) / 2
    assert report.activation_bytes(gelu_student, layout, run) == pytest.approx(expected, rel=1e-12)
    # Megatron takes this formula also with sequence parallelism, unless recomputation is selective.
    none = replace(layout, recompute="none", sequence_parallel=True)
    assert report.activation_bytes(gelu_student, none, run) == pytest.approx(expected, rel=1e-12)


def test_interleaving_costs_memory(gelu_student, run_with):
    run = run_with(**SHORT, global_batch_size=8)
    plain = Layout(gpus=4, tp=2, pp=2, recompute="selective")
    whole = report.activation_bytes(gelu_student, plain, run)
    interleaved = report.activation_bytes(gelu_student, replace(plain, vpp=2), run)
    assert interleaved == whole * (1 + 1 / 4)
