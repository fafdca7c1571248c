"""The planner against Megatron's own formulas, and against the FLOPs of real tiny models.

Tolerances: Megatron's formulas 1e-6 relative (1 % allowed); counted FLOPs exact for a student, 1e-4
for a teacher (older transformers compute the rotary angles by a product), where attention is
counted over the whole square, as it is computed on CPU, not over half of it.
"""

import pytest

from megatron_let.planning.run import Layout, RunShape
from megatron_let.planning.shapes import LLAMA_STYLE, student_shape, teacher_shape
from megatron_let.teacher.work import window_ends
from tests.support.testing import ARCHITECTURES, run_distributed, save_tiny_teacher
from tests.unit.planning import megatron_report

SEQ, ROWS = 16, 2  # of the contract's student
SHAPE = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4}
STYLES = {
    "llama": ("--untie-embeddings-and-output-weights", {}),
    "tied": ("", {"tied": True}),
    "gqa": (
        "--untie-embeddings-and-output-weights --group-query-attention --num-query-groups 2",
        {"num_query_groups": 2},
    ),
}


def student(style, vocab_size):
    changes = SHAPE | LLAMA_STYLE | STYLES[style][1]
    return student_shape(None, vocab_size=vocab_size, changes=changes)


@pytest.mark.parametrize("style", STYLES)
def test_megatron_reports_the_same(style):
    flags = [*STYLES[style][0].split(), "--global-batch-size", "8"]
    [said] = run_distributed("tests.distributed.planning:megatron_report", 1, flags, 4)
    shape = student(style, said["padded_vocab_size"])
    tokens = 8 * SEQ
    run = RunShape(
        seq_length=SEQ,
        micro_batch_size=ROWS,
        global_batch_size=8,
        train_iters=10,
        method="baseline",
    )
    layout = Layout(gpus=1, distributed_optimizer=False)
    ours = {
        "flops": tokens * shape.training_flops_per_token(SEQ),
        "weights": megatron_report.weight_and_optimizer_bytes(shape, layout),
        "with_sp": megatron_report.activation_bytes_with_sp(shape, layout, run),
        "without_sp": megatron_report.activation_bytes_without_sp(shape, layout, run),
        "padded_vocab_size": shape.vocab_size,
    }
    assert ours == pytest.approx(said, rel=1e-6)


@pytest.mark.parametrize("style", STYLES)
def test_a_student_computes_what_is_planned(style):
    flags = STYLES[style][0].split()
    [counted] = run_distributed("tests.distributed.planning:counted_flops", 1, flags)
    shape = student(style, 256)
    assert counted["parameters"] == shape.parameters
    whole_square = shape.training_flops_per_token(2 * SEQ)
    assert counted["flops"] == ROWS * SEQ * whole_square


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("length", [32, 200])
def test_a_teacher_computes_what_is_planned(architecture, length, tmp_path):
    """Its context is 128 tokens; 200 are read in windows."""
    folder = save_tiny_teacher(tmp_path, architecture)
    function = "tests.distributed.planning:counted_teacher_flops"
    [(counted, said)] = run_distributed(function, 1, str(folder), 3, length)
    shape = teacher_shape(str(folder))
    planned = 3 * length * shape.states_flops_per_token(length, length)
    assert said == pytest.approx(planned, rel=1e-9)
    # Attention over the whole square costs as much again as its causal half.
    read = 3 * min(length, 128) * len(window_ends(length, 128))
    half_square = read * shape.num_layers * 2 * shape.query_size * min(length, 128)
    assert counted == pytest.approx(planned + half_square, rel=1e-4)
