"""The gradient contract of distillation, alone and with LET: against whole logits in float64.

Tolerances, float32: what distillation adds to the gradient 1e-3, the whole of it 1e-5, relative.
"""

import pytest

from tests.distributed.conftest import agreement, layout_gradients, shape_flags
from tests.support.testing import run_distributed

PART_TOLERANCE, TOTAL_TOLERANCE = 1e-3, 1e-5
WEIGHT = 0.7
TP2, SP = "--tensor-model-parallel-size 2", "--sequence-parallel"
PP2, VPP2 = "--pipeline-model-parallel-size 2", "--num-layers-per-virtual-pipeline-stage 1"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
UNTIED = "--untie-embeddings-and-output-weights"
# 15 of the teacher's 256 rows are no tokens.
SMALL_VOCABULARY = "--vocab-size 240 --make-vocab-size-divisible-by 64"
TEMPERATURE, GATE = "--kd-temperature 2.5", "--kd-token-gate"

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
    "gate": (1, f"{UNTIED} {GATE}", 8),
    "gate_tp4_sp_padding": (4, f"{TP2.replace('2', '4')} {SP} {SMALL_VOCABULARY} {GATE}", 6),
    "gate_tp2_pp2_full_recompute": (4, f"{TP2} {PP2} {FULL} {GATE}", 8),
    "temperature": (2, f"{TP2} {UNTIED} {TEMPERATURE}", 8),
}


def distilled(world_size, flags, batch, teacher, fault=None):
    """How far a layout's gradients are from the written-out loss's."""
    words = f"{flags} --method reverse-kd --teacher-model {teacher}".split()
    actual = layout_gradients(world_size, words, batch, {"kd_weight": WEIGHT}, fault)
    temperature = 2.5 if TEMPERATURE in flags else 1.0
    return agreement(actual, written_out(words, batch, teacher, temperature, GATE in words))


def written_out(words, batch, teacher, temperature=1.0, gated=False):
    """The gradients of plain training, and what distillation adds."""
    function = "tests.distributed.distill_contract:reference_gradients"
    shape = shape_flags(words)
    [expected] = run_distributed(function, 1, shape, batch, WEIGHT, teacher, temperature, gated)
    return expected


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
    "gate_left_out": (2, f"{TP2} {UNTIED} {GATE}", 8),
    "gate_of_the_next_token": (2, f"{TP2} {UNTIED} {GATE}", 8),
}


@pytest.mark.parametrize("fault", CASES)
def test_contract_catches(fault, teacher):
    worst = distilled(*CASES[fault], teacher, fault)
    print(f"{fault}: {worst}")
    assert worst.part_error > 10 * PART_TOLERANCE
    assert worst.total_error > 10 * TOTAL_TOLERANCE


# --- let+salt -----------------------------------------------------------------------------------

LET_WEIGHT, LET_LAYER = 10.0, 2


@pytest.mark.parametrize("name", ["single", "tp2_sp", "pp2", "vpp2", "tp2_pp2_sp"])
def test_both_signals_of_one_teacher_add_up(name, teacher):
    world_size, flags, batch = LAYOUTS[name]
    let = f"--method let+salt --let-layer {LET_LAYER} --let-decay constant --kd-stop-step 10"
    words = f"{flags} {let} --teacher-model {teacher}".split()
    weights = {"let_weight": LET_WEIGHT, "kd_weight": WEIGHT}
    actual = layout_gradients(world_size, words, batch, weights, None)
    expected = written_out(words, batch, teacher)
    [aligned] = run_distributed(
        "tests.distributed.contract:reference_gradients",
        *(1, shape_flags(words), batch, LET_WEIGHT, LET_LAYER, teacher, [], "interpolate"),
    )
    both = {key: g + aligned[key] * (key[0] == "part") for key, g in expected.items()}
    worst = agreement(actual, both)
    print(f"let+salt, {name}: {worst}")
    assert worst.part_error <= PART_TOLERANCE
    assert worst.total_error <= TOTAL_TOLERANCE
    assert agreement(actual, expected).part_error > 10 * PART_TOLERANCE, "LET's part is there"
    assert agreement(actual, aligned).part_error > 10 * PART_TOLERANCE, "and distillation's"
