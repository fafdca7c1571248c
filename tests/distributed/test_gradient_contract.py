"""The gradient contract: in every layout the gradient is that of the loss written out.

Compared parameter by parameter on the final `main_grad`, with weight 10 so that a wrong factor
cannot hide under the language-model gradient. Tolerances (float32): alignment part, that is total
minus language-model part, 1e-3 relative per parameter; total 1e-5 relative.
"""

import numpy as np
import pytest

from megatron_let.testing import run_distributed, save_tiny_teacher

WEIGHT = 10.0
PART_TOLERANCE, TOTAL_TOLERANCE = 1e-3, 1e-5


TP2, SP, PP2 = (
    "--tensor-model-parallel-size 2",
    "--sequence-parallel",
    "--pipeline-model-parallel-size 2",
)
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
VPP2 = "--num-layers-per-virtual-pipeline-stage 1"

# name: (world size, flags, aligned layer, global batch size of micro-batches of 2)
LAYOUTS = {
    "single_1_micro_batch": (1, "", 2, 2),
    "single_4_micro_batches": (1, "", 2, 8),
    "single_full_recompute": (1, FULL, 2, 8),
    "single_per_token": (1, "--calculate-per-token-loss", 2, 8),
    "tp2": (2, TP2, 2, 8),
    "tp2_sp": (2, f"{TP2} {SP}", 2, 8),
    "tp2_sp_per_token": (2, f"{TP2} {SP} --calculate-per-token-loss", 2, 8),
    "pp2_last_of_first_stage": (2, PP2, 2, 8),
    "pp2_second_stage": (2, PP2, 3, 8),
    "pp2_1_micro_batch": (2, PP2, 2, 2),
    "pp2_full_recompute": (2, f"{PP2} {FULL}", 2, 8),
    "pp2_per_token": (2, f"{PP2} --calculate-per-token-loss", 2, 8),
    "vpp2_second_chunk_of_rank_0": (2, f"{PP2} {VPP2}", 3, 8),
    "dp2": (2, "", 2, 8),
    "dp2_distributed_optimizer": (2, "--use-distributed-optimizer", 2, 8),
    "dp2_overlap": (2, "--use-distributed-optimizer --overlap-grad-reduce", 2, 8),
    "tp2_pp2_sp": (4, f"{TP2} {PP2} {SP}", 2, 8),
    "pp2_dp2_distributed_optimizer": (4, f"{PP2} --use-distributed-optimizer", 3, 8),
}


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    return str(save_tiny_teacher(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="session")
def references():
    return {}


def let_flags(teacher, layer):
    return f"--method let --teacher-model {teacher} --let-layer {layer} --let-decay constant".split()


def gradients(world_size, *args):
    merged = {}
    for part in run_distributed("tests.distributed.contract:layout_gradients", world_size, *args):
        for name, gradient in part.items():
            if name in merged:  # replicas (TP of unsharded parameters, DP) must agree
                assert relative_error(gradient, merged[name]) < TOTAL_TOLERANCE, name
            merged[name] = gradient
    return merged


def relative_error(value, expected):
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(value - expected) / norm) if norm else float(np.linalg.norm(value))


def check_contract(name, teacher, references):
    """Return the largest relative error of the alignment part and of the total."""
    world_size, flags, layer, batch = LAYOUTS[name]
    actual = gradients(world_size, flags.split() + let_flags(teacher, layer), batch, WEIGHT)
    per_token = ["--calculate-per-token-loss"] if "--calculate-per-token-loss" in flags else []
    key = (layer, batch, bool(per_token))
    if key not in references:
        function = "tests.distributed.contract:reference_gradients"
        [references[key]] = run_distributed(function, 1, per_token, batch, WEIGHT, layer, teacher)
    expected = references[key]
    names = {name for _, name in expected}
    assert names == {name for _, name in actual}
    parts, totals = [], []
    for parameter in names:
        total = expected["lm", parameter] + expected["let", parameter]
        totals.append(relative_error(actual["total", parameter], total))
        part = actual["total", parameter] - actual["lm", parameter]
        if expected["let", parameter].any():
            parts.append(relative_error(part, expected["let", parameter]))
        else:  # behind layer K: nothing but rounding may remain
            parts.append(float(np.linalg.norm(part) / np.linalg.norm(total)))
    return max(parts), max(totals)


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradient_is_that_of_the_written_out_loss(name, teacher, references):
    part, total = check_contract(name, teacher, references)
    print(f"{name}: alignment part {part:.1e}, total {total:.1e}")
    assert part <= PART_TOLERANCE
    assert total <= TOTAL_TOLERANCE
