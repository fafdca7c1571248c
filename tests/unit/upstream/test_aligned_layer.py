"""With a teacher the student is the baseline's but for layer K, whatever flags shape its layers."""

import pytest

from tests.support.testing import run_distributed

LOCAL = (
    "--num-layers --qk-layernorm --multi-latent-attention --num-experts --moe-layer-freq"
).split()
TRANSFORMER_ENGINE = (
    "--transformer-impl --use-transformer-engine-op-fuser --use-grouped-gemm-for-dense-mlp"
).split()


@pytest.fixture(scope="module")
def found():
    [found] = run_distributed("tests.unit.upstream.spec_trials:sweep", 1)
    return found


def test_layer_k_alone_is_another_one(found):
    assert not found.differing
    assert len(found.equal) > 3000


def test_the_search_finds_what_shapes_a_layer(found):
    """Among them what needs another flag, or two, beside it."""
    assert {*LOCAL, "--qk-l2-norm", *TRANSFORMER_ENGINE} <= found.shaping.keys()
    assert len(found.shaping["--use-grouped-gemm-for-dense-mlp"]) == 4


def test_a_block_spec_of_our_own_would_be_caught(found):
    """The twin: the function that was here before."""
    flags = {word for words in found.old_differing for word in words}
    wrong = {"--qk-l2-norm", *TRANSFORMER_ENGINE[1:]}
    assert wrong <= flags
    assert {words for words in found.old_differing if len(words) == 1} == {("--qk-l2-norm",)}


def test_what_needs_transformer_engine_was_tried_with_its_names_only(found):
    """A skip that lists what no machine without it can say anything about."""
    needs = sorted(
        f"{' '.join(trial)} ({said})"
        for trial, said in found.refused.items()
        if any(words in said.lower() for words in ("te version", "te >=", "transformer"))
    )
    if needs:
        pytest.skip(f"refused without Transformer Engine, so not tried: {'; '.join(needs)}")
