"""The teacher's rows dealt over ranks give what one rank gives; tolerance 1e-6, float32."""

import numpy as np
import pytest

from tests.support.testing import run_distributed, save_tiny_teacher

FUNCTION = "tests.distributed.split:own_states"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_teacher(tmp_path_factory.mktemp("split")))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("ranks, cp", [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_every_rank_gets_its_states(folder, ranks, cp, rows, dtype):
    [(expected, _)] = run_distributed(FUNCTION, 1, folder, rows, 1, False, dtype)
    chunks = np.split(expected, 2 * cp)
    pairs = [np.concatenate([chunks[i], chunks[2 * cp - 1 - i]]) for i in range(cp)]
    for sequence_parallel in (False, True):
        parts = run_distributed(FUNCTION, ranks, folder, rows, cp, sequence_parallel, dtype)
        tp = ranks // cp
        slices = [np.split(pair, tp) if sequence_parallel else [pair] * tp for pair in pairs]
        wanted = [own for pair in slices for own in pair]
        tolerance = 1e-6 if dtype == "float32" else 2e-2  # sums in another order
        for (states, rows_run), own in zip(parts, wanted, strict=True):
            assert states.shape == own.shape
            np.testing.assert_allclose(states, own, atol=tolerance, rtol=tolerance)
            assert rows_run == -(-rows // ranks), "a rank runs its share and no more"
