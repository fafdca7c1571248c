"""The gradient contract of distillation, against whole logits in float64 on one process.

Tolerances, float32: what distillation adds to the gradient 1e-3, the whole of it 1e-5, relative.
"""

import pytest

from megatron_let.testing import run_distributed
from tests.distributed.conftest import _shape, agreement, layout_gradients

PART_TOLERANCE, TOTAL_TOLERANCE = 1e-3, 1e-5
WEIGHT = 0.7
TP2, SP = "--tensor-model-parallel-size 2", "--sequence-parallel"
PP2, VPP2 = "--pipeline-model-parallel-size 2", "--num-layers-per-virtual-pipeline-stage 1"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
UNTIED = "--untie-embeddings-and-output-weights"
# 15 of the teacher's 256 rows are no tokens.
SMALL_VOCABULARY = "--vocab-size 240 --make-vocab-size-divisible-by 64"
TEMPERATURE = "--kd-temperature 2.5"

# name: world size, flags, global batch size (micro-batches of 2)
LAYOUTS = {
    "single": (1, UNTIED, 8),
    "single_tied": (1, "", 8),
    "single_per_token": (1, f"{UNTIED} --calculate-per-token-loss", 8),
    "tp2": (2, f"{TP2} {UNTIED}", 8),
    "tp2_sp": (2, f"{TP2} {SP} {UNTIED}", 8),
    "tp4_sp_padding": (4, f"{TP2.replace('2', '4')} {SP} {SMALL_VOCABULARY}", 6),
    "pp2": (2, f"{PP2} {UNTIED}", 8),
    "pp2_tied_full_recompute": (2, f"{PP2} {FULL}", 8),
    "vpp2": (2, f"{PP2} {VPP2} {UNTIED}", 8),
    "dp2_distributed_optimizer": (2, f"{UNTIED} --use-distributed-optimizer", 8),
    "tp2_pp2_sp": (4, f"{TP2} {PP2} {SP} {UNTIED}", 8),
    "temperature": (2, f"{TP2} {UNTIED} {TEMPERATURE}", 8),
    "temperature_both_sides": (2, f"{TP2} {UNTIED} {TEMPERATURE} --kd-temperature-side both", 8),
}


def distilled(world_size, flags, batch, teacher, fault=None):
    """How far a layout's gradients are from the written-out loss's."""
    words = f"{flags} --method reverse-kd --teacher-model {teacher}".split()
    actual = layout_gradients(world_size, words, batch, WEIGHT, fault)
    shape = _shape(words)
    temperature = 2.5 if TEMPERATURE in flags else 1.0
    function = "tests.distributed.distill_contract:reference_gradients"
    [expected] = run_distributed(
        function, 1, shape, batch, WEIGHT, teacher, temperature, "both" in flags
    )
    return agreement(actual, expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradient_is_that_of_the_written_out_loss(name, teacher):
    worst = distilled(*LAYOUTS[name], teacher)
    print(f"{name}: {worst}")
    assert worst.part_error <= PART_TOLERANCE
    assert worst.total_error <= TOTAL_TOLERANCE


# fault: as above
CASES = {
    "padding_kept": (2, f"{TP2} {SMALL_VOCABULARY}", 8),
    "head_rows_shifted": (2, f"{TP2} {UNTIED}", 8),
    "rows_of_another_rank": (2, f"{TP2} {UNTIED}", 8),
}


@pytest.mark.parametrize("fault", CASES)
def test_contract_catches(fault, teacher):
    worst = distilled(*CASES[fault], teacher, fault)
    print(f"{fault}: {worst}")
    assert worst.part_error > 10 * PART_TOLERANCE
    assert worst.total_error > 10 * TOTAL_TOLERANCE
