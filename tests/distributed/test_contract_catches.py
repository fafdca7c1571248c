"""Each classic wrong factor, injected: the contract check must fail, and by far."""

import pytest

from megatron_let.testing import run_distributed

PART_TOLERANCE, TOTAL_TOLERANCE = 1e-3, 1e-5

TP2_SP = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2_FULL = (
    "--pipeline-model-parallel-size 2 "
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
)

# fault: world size, flags, aligned layer of 4, global batch size (micro-batches of 2)
CASES = {
    "micro_batch_factor": (1, "", 2, 8),
    "tensor_parallel_factor": (2, TP2_SP, 2, 8),
    "mean_over_the_slice": (2, TP2_SP, 2, 8),
    "unmarked_norm": (2, TP2_SP, 2, 8),
    "counted_twice": (2, PP2_FULL, 2, 8),
    "newest_micro_batch": (2, PP2_FULL, 2, 8),
}


@pytest.mark.parametrize("fault", CASES)
def test_contract_catches(fault, contract):
    if fault == "unmarked_norm":  # then the ranks' replicas of the norm disagree at once
        with pytest.raises(AssertionError, match="norm"):
            contract(*CASES[fault], fault)
        return
    part, total = contract(*CASES[fault], fault)
    print(f"{fault}: alignment part {part:.1e}, total {total:.1e}")
    assert part > 100 * PART_TOLERANCE
    assert total > 100 * TOTAL_TOLERANCE


def test_every_fault_has_a_case():
    [names] = run_distributed("tests.distributed.contract:fault_names", 1)
    assert set(names) == set(CASES)
