"""The gradient contract: in every layout the gradient is that of the loss written out.

Compared parameter by parameter on the final `main_grad`, uneven loss masks, float32. Tolerances:
alignment part (total minus language-model part) 1e-3 relative, total 1e-5.
"""

import pytest

PART_TOLERANCE, TOTAL_TOLERANCE = 1e-3, 1e-5

TP2, SP = "--tensor-model-parallel-size 2", "--sequence-parallel"
PP2, VPP2 = "--pipeline-model-parallel-size 2", "--num-layers-per-virtual-pipeline-stage 1"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
CP2 = "--context-parallel-size 2"
PER_TOKEN, ZERO1 = "--calculate-per-token-loss", "--use-distributed-optimizer"

# name: world size, flags, aligned layer of 4, global batch size (micro-batches of 2)
LAYOUTS = {
    "single_1_micro_batch": (1, "", 2, 2),
    "single_4_micro_batches": (1, "", 2, 8),
    "single_full_recompute": (1, FULL, 2, 8),
    "single_per_token": (1, PER_TOKEN, 2, 8),
    "tp2": (2, TP2, 2, 8),
    "tp2_sp": (2, f"{TP2} {SP}", 2, 8),
    "tp2_sp_per_token": (2, f"{TP2} {SP} {PER_TOKEN}", 2, 8),
    "pp2_last_of_first_stage": (2, PP2, 2, 8),
    "pp2_second_stage": (2, PP2, 3, 8),
    "pp2_1_micro_batch": (2, PP2, 2, 2),
    "pp2_full_recompute": (2, f"{PP2} {FULL}", 2, 8),
    "pp2_per_token": (2, f"{PP2} {PER_TOKEN}", 2, 8),
    "vpp2_second_chunk_of_rank_0": (2, f"{PP2} {VPP2}", 3, 8),
    "dp2": (2, "", 2, 8),
    "dp2_distributed_optimizer": (2, ZERO1, 2, 8),
    "dp2_overlap": (2, f"{ZERO1} --overlap-grad-reduce", 2, 8),
    "tp2_pp2_sp": (4, f"{TP2} {PP2} {SP}", 2, 8),
    "pp2_dp2_distributed_optimizer": (4, f"{PP2} {ZERO1}", 3, 8),
    "cp2": (2, CP2, 2, 8),
    "cp2_per_token": (2, f"{CP2} {PER_TOKEN}", 2, 8),
    "cp2_full_recompute": (2, f"{CP2} {FULL}", 2, 8),
    "cp2_tp2": (4, f"{CP2} {TP2}", 2, 8),
    "cp2_tp2_sp": (4, f"{CP2} {TP2} {SP}", 2, 8),
    "cp2_pp2": (4, f"{CP2} {PP2}", 3, 8),
    "cp2_dp2_distributed_optimizer": (4, f"{CP2} {ZERO1}", 2, 8),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradient_is_that_of_the_written_out_loss(name, contract):
    worst = contract(*LAYOUTS[name])
    print(f"{name}: {worst}")
    assert worst.part_error <= PART_TOLERANCE
    assert worst.total_error <= TOTAL_TOLERANCE
