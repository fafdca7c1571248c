"""Hugging Face to Megatron's layouts and back: the same function there, the same bytes after."""

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_let.conversion.from_hf import FLAGS_FILE, import_model
from megatron_let.conversion.to_hf import export
from tests.distributed.training import run, series
from tests.support.testing import run_distributed
from tests.unit.conversion.hf_models import MODELS, VOCAB, save_model

TOLERANCE = 1e-5  # of the largest logit; float32 on both sides
TP2_PP2 = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel"
VPP2 = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
LAYOUTS = [(name, 4, TP2_PP2) for name in MODELS] + [(n, 2, VPP2) for n in ("llama", "gpt2")]
RUN = (
    "--seq-length 32 --micro-batch-size 2 --global-batch-size 4 --train-iters 1 --lr 1e-3 "
    "--mock-data --eval-iters 0 --eval-interval 10 --save-interval 10 --cpu "
    "--attention-dropout 0 --hidden-dropout 0 --no-save-optim --no-save-rng"
).split()


def in_layout(folder, world_size, layout, save):
    """Run an imported model in a layout, with the flags that the import tells."""
    flags = (folder / FLAGS_FILE).read_text().split()
    generator = np.random.default_rng(0)
    ids = generator.integers(VOCAB, size=(2, 2, 32))
    argv = [*RUN, *flags, *layout.split(), "--save", str(save)]
    results = run_distributed(
        "tests.distributed.conversion:load_run_and_save", world_size, argv, ids
    )
    logits = next(result for result in results if result is not None)
    return ids.reshape(4, 32), logits.reshape(4, 32, -1)[..., :VOCAB]


def logits_of(folder, ids):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.from_numpy(ids)).logits.numpy()


def error(ours, theirs):
    return float(abs(ours - theirs).max() / abs(theirs).max())


@pytest.mark.parametrize(
    ("name", "world_size", "layout"), LAYOUTS, ids=[f"{n}-{w}" for n, w, _ in LAYOUTS]
)
def test_logits_in_a_layout_and_bytes_after(name, world_size, layout, tmp_path):
    original = save_model(name, tmp_path / "hf")
    load = import_model(str(original), tmp_path / "megatron")
    ids, theirs = in_layout(load, world_size, layout, tmp_path / "run")
    difference = error(logits_of(original, ids), theirs)
    print(f"{name} {layout}: {difference:.1e} of the largest logit")
    assert difference <= TOLERANCE

    folder = export(tmp_path / "run", tmp_path / "back")
    ours, expected = (load_file(f / "model.safetensors") for f in (folder, original))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)
    assert error(logits_of(folder, ids), theirs) <= TOLERANCE


def test_training_starts_from_an_import_and_goes_on(corpus, tmp_path):
    """At step 0 with a fresh optimizer, from these weights; then as any run."""
    load = import_model(str(save_model("llama", tmp_path / "hf")), tmp_path / "start")
    flags = [*corpus.flags, *(load / FLAGS_FILE).read_text().split("--tokenizer-type")[0].split()]
    save = ["--save", str(tmp_path / "run")]
    assert not run(1, *flags, *save, "--exit-interval", "2")
    assert not run(1, *flags, *save, "--load", str(tmp_path / "run"), "--exit-interval", "4")
    losses = series(tmp_path / "run", "lm loss")
    assert set(losses) == {1, 2, 3, 4}
    # These weights are worse than those of a model that starts anew, which is near ln 256 = 5.55.
    ids = np.random.default_rng(0).integers(1, 256, size=(64, 17))
    logits = torch.from_numpy(logits_of(tmp_path / "hf", ids[:, :-1])[..., :256])
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(ids[:, 1:]).flatten()
    )
    assert losses[1] == pytest.approx(expected.item(), abs=0.2) and losses[1] > 5.9


FAULTS = {
    "two layers exchanged": (
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    ),
    "gate and up exchanged": (
        "model.layers.2.mlp.gate_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
    ),
    "key and value exchanged": (
        "model.layers.3.self_attn.k_proj.weight",
        "model.layers.3.self_attn.v_proj.weight",
    ),
    "norms exchanged": (
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
    ),
}


def test_what_the_comparison_catches(tmp_path):
    """Twin: one pair of tensors in each other's place shows in the logits."""
    original = save_model("llama", tmp_path / "hf")
    load = import_model(str(original), tmp_path / "megatron")
    ids, theirs = in_layout(load, 4, TP2_PP2, tmp_path / "run")
    path = original / "model.safetensors"
    tensors = load_bytes(path.read_bytes())  # not mapped: the file is overwritten
    for fault, (first, second) in FAULTS.items():
        save_file(tensors | {first: tensors[second], second: tensors[first]}, path)
        difference = error(logits_of(original, ids), theirs)
        print(f"{fault}: {difference:.1e}")
        assert difference > 100 * TOLERANCE, fault
    save_file(tensors, path)
    config = original / "config.json"
    config.write_text(config.read_text().replace('"factor": 4.0', '"factor": 8.0'))
    assert error(logits_of(original, ids), theirs) > 10 * TOLERANCE  # Megatron's default
