"""Growth computes the same: tolerance 2e-5 of the largest logit, float32, on 2 x 64 tokens."""

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from megatron_let.conversion import growth as module
from megatron_let.conversion.grow import TOLERANCE, grow_model, streamed_logits
from megatron_let.conversion.growth import Axis, Grown, Growth, grown_config
from megatron_let.errors import UsageError
from megatron_let.planning.shapes import from_hf_config
from tests.unit.conversion.hf_models import write_tokenizer

VOCAB = 128
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
PAD = {"hidden": 192, "ffn": 131, "heads": 12, "groups": 4}
CLONE = {
    "hidden": 144,
    "ffn": 192,
    "heads": 18,
    "groups": 6,
    "tied": False,
}
EXACT = {
    "wider": (PAD, Growth()),
    "an odd width": (PAD | {"hidden": 84, "ffn": 97}, Growth()),
    "wider groups": (PAD | {"groups": 3}, Growth()),
    "narrower groups": (PAD | {"heads": 16, "groups": 8}, Growth()),
    "more heads than the width": (
        PAD | {"heads": 24, "groups": 8},
        Growth(),
    ),
    "groups to as many as heads": (
        PAD | {"heads": 16, "groups": 16},
        Growth(),
    ),
    "heads of twice the size": (PAD | {"head_dim": 16}, Growth()),
    "of four times, no groups": (
        PAD | {"heads": 16, "groups": 16, "head_dim": 32},
        Growth(),
    ),
    "new layers": (PAD | {"layers": 6}, Growth()),
    "layers in no ratio": (PAD | {"layers": 7}, Growth()),
    "only deeper": ({"layers": 4}, Growth()),
    "untied": (PAD | {"tied": False}, Growth()),
    "cloned": (CLONE, Growth(width="clone")),
    "cloned, with noise": (CLONE, Growth(width="clone", symmetry="noise")),
    "three times, other heads": (
        CLONE
        | {
            "hidden": 216,
            "ffn": 250,
            "heads": 12,
            "groups": 4,
            "layers": 5,
        },
        Growth(width="clone", symmetry="noise"),
    ),
}


def make(tied=True, family="llama"):
    """A model with weights as large as trained ones, norms not one, biases not zero."""
    torch.manual_seed(0)
    config, model = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[family]
    made = model(config(**SMALL, tie_word_embeddings=tied))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            spread = 0.5 if "embed" in name else 0.12
            norm = torch.rand_like(weight) + 0.5
            weight.copy_(norm if "norm" in name else torch.randn_like(weight) * spread)
    return made.eval()


@pytest.fixture(scope="module")
def models():
    return {key: make(*key) for key in ((True, "llama"), (False, "llama"), (True, "qwen2"))}


def shape_of(model, **sizes):
    """Its sizes, or those of a larger one, by shorter names."""
    shape = from_hf_config(model.config.to_dict(), name="a model")
    return replace(shape, **{NAMES.get(name, name): size for name, size in sizes.items()})


class Weights:
    def __init__(self, model):
        self.state = model.state_dict()

    def read(self, name):
        return self.state[name]


def grow(model, sizes, growth, epsilon=None):
    old, new = shape_of(model), shape_of(model, **sizes)
    grown = Grown(Weights(model).read, old, new, growth)
    config = type(model.config)(**grown_config(model.config, new, growth))
    config.rms_norm_eps = epsilon or config.rms_norm_eps
    large = type(model)(config).eval()
    names = [name for name in large.state_dict() if not (new.tied and name == "lm_head.weight")]
    large.load_state_dict({name: grown.read(name) for name in names}, strict=False)
    large.tie_weights()
    return large


def difference(one, other):
    ids_BS = torch.randint(VOCAB, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = one(ids_BS).logits, other(ids_BS).logits
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


NAMES = {
    "hidden": "hidden_size", "ffn": "ffn_hidden_size", "layers": "num_layers",
    "heads": "num_attention_heads", "groups": "num_query_groups", "head_dim": "kv_channels",
}  # fmt: skip
OTHERS = ("wider", "heads of twice the size", "new layers", "cloned, with noise")


@pytest.mark.parametrize(
    ("small", "name"),
    [((True, "llama"), name) for name in EXACT]
    + [(small, name) for small in ((False, "llama"), (True, "qwen2")) for name in OTHERS],
    ids=str,
)
def test_it_computes_the_same(models, small, name):
    model = models[small]
    sizes, growth = EXACT[name]
    sizes = sizes if small[0] else sizes | {"tied": False}
    assert growth.is_exact(shape_of(model), shape_of(model, **sizes))
    assert difference(model, grow(model, sizes, growth)) <= TOLERANCE


@pytest.mark.parametrize(
    "fault", ["epsilon", "o columns", "q not scaled", "mixed heads", "v where k is", "no division"]
)
def test_and_with_a_fault_it_does_not(models, monkeypatch, fault):
    model, sizes, growth = models[True, "llama"], PAD | {"head_dim": 16}, Growth()
    epsilon = None
    if fault == "epsilon":  # small features, so that it counts
        model = make()
        model.model.embed_tokens.weight.data.mul_(1e-2)
        epsilon = model.config.rms_norm_eps
    elif fault == "o columns":
        monkeypatch.setattr(module, "WRITERS", ("down_proj",))
    elif fault == "q not scaled":
        monkeypatch.setattr(Grown, "_turned", lambda self, kind: 1.0)
    elif fault == "mixed heads":
        right = module.head_axes
        order = torch.randperm(12, generator=torch.Generator().manual_seed(0))

        def mixed(old, new, width):
            axes = right(old, new, width)
            for name in ("query", "read"):
                axes[name] = Axis(axes[name].source.view(12, -1)[order].flatten())
            return axes

        monkeypatch.setattr(module, "head_axes", mixed)
    elif fault == "v where k is":
        right = module.head_axes
        monkeypatch.setattr(
            module, "head_axes", lambda *sizes: (a := right(*sizes)) | {"value": a["key"]}
        )
    elif fault == "no division":
        sizes, growth = CLONE, Growth(width="clone")
        right = module.widened
        monkeypatch.setattr(module, "widened", lambda *a: right(*a)._replace(copies=1))
    assert difference(model, grow(model, sizes, growth, epsilon)) > 5 * TOLERANCE


@pytest.mark.parametrize(
    ("sizes", "growth"),
    [
        (PAD | {"layers": 6}, Growth(depth="stack")),
        (PAD | {"layers": 6}, Growth(depth="interleave")),
        (CLONE, Growth(width="clone", symmetry="next-layer")),
    ],
    ids=["stack", "interleave", "next-layer"],
)
def test_what_is_not_exact_says_so(models, sizes, growth):
    model = models[True, "llama"]
    assert not growth.is_exact(shape_of(model), shape_of(model, **sizes))
    assert difference(model, grow(model, sizes, growth)) > TOLERANCE


def gradients_of_two_copies(model, sizes, growth):
    large = grow(model, sizes, growth)
    ids_BS = torch.randint(VOCAB, (2, 64), generator=torch.Generator().manual_seed(0))
    large(ids_BS, labels=ids_BS).loss.backward()
    gate = large.model.layers[1].mlp.gate_proj.weight.grad
    one, other = gate[:96, :72], gate[96:, 72:]
    return torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()


def test_copies_part_where_symmetry_is_broken(models):
    model = models[True, "llama"]
    assert gradients_of_two_copies(model, CLONE, Growth(width="clone")) > 0.9999
    for symmetry in ("noise", "next-layer"):
        growth = Growth(width="clone", symmetry=symmetry)
        assert gradients_of_two_copies(model, CLONE, growth) < 0.99


def test_random_parts_depend_on_seed_and_name_alone(models):
    model = models[True, "llama"]
    old, new = shape_of(model), shape_of(model, **PAD)
    name = "model.layers.1.mlp.up_proj.weight"
    one, again, other = (
        Grown(Weights(model).read, old, new, Growth(seed=seed)) for seed in (0, 0, 1)
    )
    one.read("model.layers.2.self_attn.q_proj.weight")  # in another order
    assert torch.equal(one.read(name), again.read(name))
    assert not torch.equal(one.read(name), other.read(name))
    assert one.read(name)[96:].std() == pytest.approx(module.INIT_STD, rel=0.1)


MISTAKES = {
    "smaller": (
        {"hidden": 64, "heads": 8, "groups": 4},
        Growth(),
        "--hidden-size 64 is smaller",
    ),
    "fewer layers": ({"layers": 2}, Growth(), "--num-layers 2 is smaller"),
    "head size": (PAD | {"head_dim": 12}, Growth(), "--kv-channels 12 is no multiple"),
    "no heads of it": (
        PAD | {"heads": 13},
        Growth(),
        "13 attention heads cannot share 4",
    ),
    "groups": (
        PAD | {"groups": 2},
        Growth(),
        "--num-query-groups 2 of 6 query heads cannot hold",
    ),
    "clone of a half": (CLONE | {"hidden": 108}, Growth(width="clone"), "108 "),
    "tied clone": (CLONE | {"tied": True}, Growth(width="clone"), "needs --untie"),
    "symmetry of none": (PAD, Growth(symmetry="noise"), "symmetry noise has no effect"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_shape_that_cannot_be(models, name):
    sizes, growth, words = MISTAKES[name]
    with pytest.raises(UsageError, match=words):
        grow(models[True, "llama"], sizes, growth)
    if name == "tied clone":
        with pytest.raises(UsageError, match="output layer is not its embedding"):
            grow(models[False, "llama"], PAD | {"tied": True}, Growth())


# --- folders ------------------------------------------------------------------------------------


SIZES = {"hidden_size": 144, "num_layers": 4, "num_attention_heads": 18, "num_query_groups": 6}


def test_a_folder_grows(models, tmp_path):
    model = models[True, "llama"]
    model.save_pretrained(tmp_path / "small")
    verdict = grow_model(str(tmp_path / "small"), tmp_path / "large", SIZES, Growth())
    assert "logits on 128 tokens" in verdict
    large = AutoModelForCausalLM.from_pretrained(tmp_path / "large")
    sizes = {"hidden": 144, "layers": 4, "heads": 18, "groups": 6}
    assert shape_of(large) == shape_of(model, **sizes)
    assert difference(model, large) <= TOLERANCE
    assert large.dtype == torch.float32
    written = json.loads((tmp_path / "large" / "config.json").read_text())
    assert written["rope_theta"] == model.config.rope_parameters["rope_theta"]


def test_nothing_is_written_that_is_not_proven(models, tmp_path, monkeypatch):
    models[True, "llama"].save_pretrained(tmp_path / "small")
    monkeypatch.setattr(Grown, "_norm", lambda self, small: torch.ones(144))
    with pytest.raises(UsageError, match="computes something else: logits on 128 tokens"):
        grow_model(str(tmp_path / "small"), tmp_path / "large", SIZES, Growth())
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_what_is_rounded_is_said(models, tmp_path):
    models[True, "llama"].save_pretrained(tmp_path / "small")
    small = str(tmp_path / "small")
    verdict = grow_model(small, tmp_path / "bf16", SIZES, Growth(), dtype="bf16")
    assert float(verdict.split("difference ")[1].split(" ")[0]) > TOLERANCE
    with pytest.raises(UsageError, match="--max-shard-size 5 is not a size"):
        grow_model(small, tmp_path / "large", SIZES, Growth(), max_shard_size="5")
    write_tokenizer(tmp_path / "small", VOCAB + 3)  # with ids that the model has no row for
    text = tmp_path / "text"
    text.write_text(f"w5 w{VOCAB + 2}{' ' * 65_536}w7")  # of a corpus the beginning is read
    verdict = grow_model(small, tmp_path / "large", SIZES, Growth(), text=text)
    assert "loss on 2 tokens of text" in verdict
    text.write_text("w5")
    with pytest.raises(UsageError, match="text has no two tokens"):
        grow_model(small, tmp_path / "other", SIZES, Growth(), text=text)


def test_another_family_is_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UsageError, match="is a gpt2: only llama and qwen2 can be grown"):
        grow_model(str(tmp_path / "gpt2"), tmp_path / "large", SIZES, Growth())


def test_one_layer_at_a_time_computes_what_the_model_does(models):
    for model in models.values():
        ids_BS = torch.arange(2 * 20).view(2, 20) % VOCAB
        read = []

        def noting(name, model=model, read=read):
            read.append(name)
            return Weights(model).read(name)

        with torch.no_grad():
            expected = model(ids_BS).logits
        assert torch.allclose(streamed_logits(model.config, noting, ids_BS), expected, atol=1e-5)
        assert len(read) == len(set(read)) + model.config.tie_word_embeddings
        assert math.isfinite(expected.abs().max())
