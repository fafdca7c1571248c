from dataclasses import replace

import pytest

from megatron_let.planning.memory import (
    RUNTIME_BYTES,
    attention_score_bytes,
    layer_activation_bytes,
    parameters_per_rank,
    stages_memory,
)
from megatron_let.planning.run import Layout
from megatron_let.planning.shapes import teacher_shape
from tests.unit.planning import megatron_report as report

BATCH_TOKENS = 4 * 2048


def test_weights_gradients_optimizer(student, layout, run_with):
    first, middle = stages_memory(student, None, layout, run_with())[:2]
    layers = 6 * student.layer_parameters
    assert middle.weights == 2 * layers and middle.gradients == 4 * layers
    assert middle.optimizer == 12 * layers / 8
    assert first.weights - middle.weights == 2 * student.embedding_parameters
    plain = replace(layout, distributed_optimizer=False)
    assert stages_memory(student, None, plain, run_with())[1].optimizer == 12 * layers
    total = first.weights + first.gradients + first.optimizer + first.activations + RUNTIME_BYTES
    assert first.total == total


def test_the_stages_together_hold_the_model(student, gelu_student):
    stages = [parameters_per_rank(student, Layout(gpus=4, pp=4), stage) for stage in range(4)]
    assert sum(stages) == student.parameters
    # A tied head is a copy on the last stage; on a single stage it is not.
    stages = [parameters_per_rank(gelu_student, Layout(gpus=2, pp=2), stage) for stage in (0, 1)]
    assert sum(stages) == gelu_student.parameters + gelu_student.embedding_parameters
    assert parameters_per_rank(gelu_student, Layout(gpus=1), 0) == gelu_student.parameters


def test_tensor_parallelism_divides_matrices_only(student):
    whole = parameters_per_rank(student, Layout(gpus=1), 0)
    half = parameters_per_rank(student, Layout(gpus=2, tp=2), 0)
    norms = 49 * 2048
    assert half == (whole - norms) / 2 + norms


@pytest.mark.parametrize("gpus, tp, pp", [(8, 1, 1), (32, 1, 4), (32, 2, 4), (64, 8, 2)])
def test_agrees_with_megatrons_weights_and_optimizer(student, run_with, gpus, tp, pp):
    """Tolerance: 0.1 %; Megatron spreads the final norm over the stages."""
    layout = Layout(gpus=gpus, tp=tp, pp=pp)
    fullest = max(
        stage.weights + stage.gradients + stage.optimizer
        for stage in stages_memory(student, None, layout, run_with())
    )
    assert fullest == pytest.approx(report.weight_and_optimizer_bytes(student, layout), rel=1e-3)


@pytest.mark.parametrize("shards, factor", [(True, 10 / 2 + 24 / 2), (False, 10 + 24 / 2)])
def test_a_layer_is_the_papers(gelu_student, run_with, shards, factor):
    layout = Layout(gpus=2, tp=2, sequence_parallel=shards)
    bytes_per_rank = layer_activation_bytes(gelu_student, layout, run_with(dropout=True))
    assert bytes_per_rank == BATCH_TOKENS * 1024 * factor


def test_agrees_with_megatrons_activations(gelu_student, run_with):
    """Where both describe the same: GELU, dropout, SP. Tolerance: rounding; no head on stage 0."""
    layout = Layout(gpus=4, tp=2, pp=2, recompute="selective")
    run = run_with(dropout=True)
    # Megatron divides the token ids over the tensor-parallel ranks; each rank has all of them.
    token_ids = 2 * 8 * BATCH_TOKENS / 2
    learned = replace(gelu_student, position_rows=2048)  # nothing is rotated
    first = stages_memory(learned, None, layout, run)[0].activations
    expected = report.activation_bytes(gelu_student, layout, run) + token_ids
    assert first == pytest.approx(expected, rel=1e-12)


def test_attention_that_is_run_again_keeps_the_joint_projection(student, run_with):
    """What rotates queries and keys makes new ones; the values are a view of the projection."""
    kept = [
        stages_memory(student, None, Layout(gpus=1, recompute=how), run_with())[0].activations
        for how in ("none", "selective")
    ]
    assert kept[1] - kept[0] == 24 * BATCH_TOKENS * 2 * 2 * 2048


def test_a_swiglu_layer_without_dropout(student, run_with):
    # Both norms' inputs and outputs, q, k, v and their result: 8 x 2048; gate, up, product.
    layout = Layout(gpus=1)
    expected = BATCH_TOKENS * 2 * (8 * 2048 + 3 * 5504)
    assert layer_activation_bytes(student, layout, run_with()) == expected


def test_attention_scores(student, run_with):
    layout = Layout(gpus=2, tp=2, flash_attention=False)
    scores = 16 * 2048 * BATCH_TOKENS / 2
    assert attention_score_bytes(student, layout, run_with()) == 2 * scores
    assert attention_score_bytes(student, layout, run_with(dropout=True)) == 5 * scores
    assert attention_score_bytes(student, Layout(gpus=1), run_with()) == 0


def test_recomputation(student, run_with):
    """Stage 1 of 4 keeps 3 micro-batches of 6 layers."""

    def activations(recompute: str) -> float:
        layout = Layout(gpus=32, pp=4, recompute=recompute, flash_attention=False)
        return stages_memory(student, None, layout, run_with())[1].activations

    layer = BATCH_TOKENS * 2 * (8 * 2048 + 3 * 5504)
    scores = 2 * 16 * 2048 * BATCH_TOKENS
    assert activations("none") == 18 * (layer + scores)
    assert activations("selective") == 18 * layer + scores
    assert activations("full") == 18 * BATCH_TOKENS * 2 * 2048 + layer + scores


def test_the_last_stage_holds_the_logits(student, layout, run_with):
    last = stages_memory(student, None, layout, run_with())[3].activations
    layer = BATCH_TOKENS * 2 * (8 * 2048 + 3 * 5504)
    assert last == 6 * layer + BATCH_TOKENS * (4 * 2048 + 6 * 49152)


def test_the_teacher_is_on_the_stage_of_its_layer_only(student, teacher, layout, run_with):
    stages = stages_memory(student, teacher, layout, run_with(let_layer=7))
    assert [stage.teacher for stage in stages] == [0, 2 * 134_515_008, 0, 0]
    # 3 alignment gradients wait, one micro-batch of states; a layer: states twice, MLP's three.
    width = 3 * 2048 + 576 + (2 * 576 + 3 * 1536)
    assert [stage.states for stage in stages] == [0, 2 * BATCH_TOKENS * width, 0, 0]


def test_a_teacher_with_another_tokenizer_reads_longer_rows(student, teacher, layout, run_with):
    stages = stages_memory(student, teacher, layout, run_with(teacher_seq_length=3072))
    # What waits is the student's; the pass itself has half as many tokens more.
    width = 4 * 2048 + 576 + 1.5 * (2 * 576 + 3 * 1536)
    assert stages[0].states == 2 * BATCH_TOKENS * width


def test_with_full_recomputation_the_states_wait(student, teacher, run_with):
    layout = Layout(gpus=32, pp=4, recompute="full")
    first = stages_memory(student, teacher, layout, run_with())[0]
    width = 1 * 2048 + 4 * 576 + (2 * 576 + 3 * 1536)
    assert first.states == 2 * BATCH_TOKENS * width


def test_sequence_shards_and_rows_dealt(student, teacher, run_with):
    # One row for two ranks: two micro-batches are dealt together, and each rank queues its
    # halves of both; four alignment gradients wait.
    layout = Layout(gpus=64, tp=2, pp=4)
    first = stages_memory(student, teacher, layout, run_with(micro_batch_size=1))[0]
    halves = 2048 / 2 * (2 * 576 + 4 * 2048)
    working = 2048 * (2 * 576 + 3 * 1536)
    assert first.states == 2 * (halves + working)


def test_the_head_stays_where_the_teacher_is_scored(student, layout, run_with):
    untied = replace(teacher_shape("pythia-160m"), context=None)
    steps, scored = (
        stages_memory(student, untied, layout, run_with(method="let", guidance_stop=stop))[0]
        for stop in ("step", "loss")
    )
    assert scored.teacher - steps.teacher == 2 * untied.embedding_parameters
    assert scored.states > steps.states
    salt = run_with(method="let+salt", guidance_stop="loss")
    assert stages_memory(student, untied, layout, salt)[0].teacher == steps.teacher


def test_let_drops_the_head_and_salt_needs_it(student, layout, run_with):
    pythia = teacher_shape("pythia-160m")
    let = stages_memory(student, pythia, layout, run_with())
    salt = stages_memory(student, pythia, layout, run_with(method="salt"))
    both = stages_memory(student, pythia, layout, run_with(method="let+salt"))
    body = 2 * (162_322_944 - 50304 * 768)
    assert [stage.teacher for stage in let] == [body, 0, 0, 0]
    assert [stage.teacher for stage in salt] == [0, 0, 0, 2 * 162_322_944]
    assert [stage.teacher for stage in both] == [body, 0, 0, 2 * 162_322_944]
    # Without alignment the aligned layer does not matter, whatever the student's depth.
    shallow = replace(student, num_layers=2)
    stages_memory(shallow, pythia, Layout(gpus=8, pp=1), run_with(method="salt"))
