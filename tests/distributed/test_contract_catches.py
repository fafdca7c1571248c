"""Each classic wrong factor, injected: the contract check must fail, and by far."""

import pytest

from tests.support.testing import run_distributed

PART_TOLERANCE, TOTAL_TOLERANCE = 1e-3, 1e-5

TP2_SP = "--tensor-model-parallel-size 2 --sequence-parallel"
CP2 = "--context-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
VPP2 = f"{PP2} --num-layers-per-virtual-pipeline-stage 1"
CCA = "--let-loss cca --hidden-size 8 --kv-channels 4"
PP2_FULL = f"{PP2} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"

# fault: world size, flags, aligned layer of 4, global batch size (micro-batches of 2)
CASES = {
    "micro_batch_factor": (1, "", 2, 8),
    "tensor_parallel_factor": (2, TP2_SP, 2, 8),
    "mean_over_the_slice": (2, TP2_SP, 2, 8),
    "unmarked_norm": (2, TP2_SP, 2, 8),
    "counted_twice": (2, PP2_FULL, 2, 8),
    "newest_micro_batch": (2, PP2_FULL, 2, 8),
    "per_micro_batch_mean": (1, "--calculate-per-token-loss", 2, 8),
    "unmarked_map": (2, f"{TP2_SP} --let-resize linear", 2, 8),
    "index_without_virtual_stage": (2, VPP2, 3, 8),
    "no_loss_mask": (2, PP2, 2, 8),
    "view_from_the_last_layer": (2, PP2, 2, 8),
    "rows_of_another_rank": (2, TP2_SP, 2, 8),
    "context_parallel_factor": (2, CP2, 2, 8),
    "tokens_of_the_whole_sequence": (2, CP2, 2, 8),
    "contiguous_context_slices": (2, CP2, 2, 8),
    "documents_ignored": (1, "--reset-position-ids --reset-attention-mask", 2, 8),
    "statistics_of_the_slice": (2, f"{TP2_SP} {CCA}", 2, 8),
    "statistics_of_masked_tokens": (1, CCA, 2, 8),
}
# These do not get as far as a wrong gradient: replicas disagree, or Megatron stops.
LOUD = {
    "unmarked_norm": (AssertionError, "norm"),
    "unmarked_map": (AssertionError, "let_resize"),
    "view_from_the_last_layer": (RuntimeError, "view of another tensor"),
}


@pytest.mark.parametrize("fault", CASES)
def test_contract_catches(fault, contract):
    if fault in LOUD:
        error, words = LOUD[fault]
        with pytest.raises(error, match=words):
            contract(*CASES[fault], fault)
        return
    worst = contract(*CASES[fault], fault)
    print(f"{fault}: {worst}")
    assert worst.part_error > 100 * PART_TOLERANCE
    assert worst.total_error > 100 * TOTAL_TOLERANCE


def test_every_fault_has_a_case():
    [names] = run_distributed("tests.distributed.contract:fault_names", 1)
    assert set(names) == set(CASES)
