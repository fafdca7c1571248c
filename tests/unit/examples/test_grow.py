"""Growth: exact where it should be, and the check sees what is not."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from examples.quickstart.run import Model
from examples.study import grow as module
from examples.study.grow import TOLERANCE, depth_map, grow, relative_difference

SHAPE = Model(layers=4, hidden=80, heads=5, ffn=216, steps=1, lr=1.0)


@pytest.fixture(scope="module")
def teacher():
    """Weights of realistic size, norms that are not 1."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=48,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=3,
            max_position_embeddings=64,
            rms_norm_eps=1e-3,
            tie_word_embeddings=True,
        )
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            size = 0.5 if "embed" in name else 0.12
            weight.copy_(
                torch.rand_like(weight) + 0.5 if "norm" in name else torch.randn_like(weight) * size
            )
    return model.eval()


def test_wider_and_deeper_computes_the_same(teacher):
    grown = grow(teacher, SHAPE, "identity")
    assert relative_difference(teacher, grown) <= TOLERANCE
    assert grown.num_parameters() == SHAPE.parameters(128)


def test_every_new_feature_can_learn(teacher):
    grown = grow(teacher, SHAPE, "identity")
    ids = torch.randint(128, (2, 64))
    grown(ids, labels=ids).loss.backward()
    stuck = [name for name, weight in grown.named_parameters() if not weight.grad.any()]
    # Where o and down are zero, what stands before them moves a step later.
    assert all("layers.1." in name or "layers.3." in name for name in stuck)


@pytest.mark.parametrize("depth", ["stack", "interleave"])
def test_repeated_layers_are_not_exact(teacher, depth):
    assert relative_difference(teacher, grow(teacher, SHAPE, depth)) > 100 * TOLERANCE


@pytest.mark.parametrize("fault", ["epsilon", "norm", "writers"])
def test_the_check_catches_a_fault(teacher, fault, monkeypatch):
    if fault == "epsilon":
        config = module.grown_config
        old = {"rms_norm_eps": teacher.config.rms_norm_eps}
        monkeypatch.setattr(
            module, "grown_config", lambda *a: LlamaConfig(**(config(*a).to_dict() | old))
        )
    elif fault == "norm":
        monkeypatch.setattr(module, "_grow_norm", lambda old, new: new[: len(old)].copy_(old))
    else:
        monkeypatch.setattr(module, "WRITERS", ())
    assert relative_difference(teacher, grow(teacher, SHAPE, "identity")) > 10 * TOLERANCE


def test_depth_maps():
    assert depth_map(2, 4, "stack") == [0, 1, 0, 1]
    assert depth_map(2, 4, "interleave") == [0, 0, 1, 1]
    assert depth_map(2, 4, "identity") == [0, None, 1, None]


@pytest.mark.parametrize(
    "shape",
    [
        Model(layers=3, hidden=80, heads=5, ffn=216, steps=1, lr=1.0),
        Model(layers=4, hidden=80, heads=4, ffn=216, steps=1, lr=1.0),
        Model(layers=4, hidden=32, heads=2, ffn=216, steps=1, lr=1.0),
    ],
)
def test_shapes_that_do_not_fit_are_refused(teacher, shape):
    with pytest.raises(ValueError, match="Model"):
        grow(teacher, shape, "stack")
