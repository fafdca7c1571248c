"""A model that people use: SmolLM2-135M, from a wheel of PyPI (93 MB), as a .gguf file."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from examples.real_teacher.run import teacher_file
from megatron_let.commands import convert_checkpoint

PROMPT = "The capital of France is"


def convert(words):
    convert_checkpoint.main(words.split())


def states_and_text(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
        written = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return logits, tokenizer.decode(written[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model as a Hugging Face folder."""
    file, made = teacher_file(), tmp_path_factory.mktemp("smollm2")
    options = {"gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    # What was read from such a file is not written, a model of the same weights is.
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(file.parent, **options))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(made)
    AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(made)
    return made


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_goes_to_megatron_and_back(folder, tmp_path):
    """Tensors bit for bit; `--verify` holds the logits of Megatron's model against them, 1e-4."""
    convert(f"from-hf --hf-model {folder} --output {tmp_path}/megatron --verify")
    convert(f"to-hf --load {tmp_path}/megatron --output {tmp_path}/back")
    before, after = (
        load_file(f"{place}/model.safetensors") for place in (folder, tmp_path / "back")
    )
    before.pop("lm_head.weight", None)
    after.pop("lm_head.weight", None)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_grown_it_says_the_same(folder, tmp_path):
    """Wider and deeper; logits within 2e-5 of the largest."""
    convert(
        f"grow --hf-model {folder} --output {tmp_path}/big --hidden-size 768 --num-layers 36 "
        "--ffn-hidden-size 2048 --num-attention-heads 12 --num-query-groups 4"
    )
    (small, said), (big, says) = map(states_and_text, (folder, tmp_path / "big"))
    assert (big - small).abs().max() <= 2e-5 * small.abs().max()
    assert says == said
    assert "Paris" in said
