"""One student, one teacher, one run: the paper's size, as most tests use it."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_let.planning.run import Layout, RunShape
from megatron_let.planning.shapes import ModelShape, student_shape, teacher_shape


@pytest.fixture
def student() -> ModelShape:
    """24 x 2048 x 5504, SwiGLU, untied: 1,415,677,952 parameters."""
    return student_shape("1.4b", vocab_size=49152)


@pytest.fixture
def gelu_student() -> ModelShape:
    """8 layers that Megatron's memory formulas describe exactly: GELU of 4 x 1024, no bias."""
    changes = {"num_layers": 8, "hidden_size": 1024, "num_attention_heads": 16}
    no_bias = {"qkv_bias": False, "output_bias": False, "mlp_bias": False}
    return student_shape(None, vocab_size=32768, changes=changes | no_bias)


@pytest.fixture
def teacher() -> ModelShape:
    return teacher_shape("smollm-135m")


@pytest.fixture
def layout() -> Layout:
    return Layout(gpus=32, pp=4)


@pytest.fixture
def run_with():
    """A run of 16 micro-batches of 4 x 2048 tokens on 8 data-parallel ranks, with changes."""
    usual = RunShape(seq_length=2048, micro_batch_size=4, global_batch_size=512, train_iters=19073)

    def make(**changes: Any) -> RunShape:
        return replace(usual, **changes)

    return make
