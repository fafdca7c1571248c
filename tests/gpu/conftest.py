"""These tests need a CUDA device; without one each is skipped and says so."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")  # before any model is loaded
def device():
    """Skip on a machine without a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device: the fused path was not run here")
