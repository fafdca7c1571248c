"""What is refused as a teacher, and a zoo of what is not: tiny random models of each kind.

Documents kept apart: states equal to those of each read alone within 1e-3, relative; a window left
out of the mask changes them by 0.1 and more.
"""

import json

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_let.errors import UsageError
from megatron_let.teacher import stage
from megatron_let.teacher.load import load_causal_lm, read_teacher_config
from megatron_let.teacher.probe import check_documents, check_states, check_weights
from megatron_let.teacher.stage import Teacher, text_model
from tests.support.testing import save_tiny_teacher

VOCAB, LENGTH = 256, 24
PLAIN = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
GROUPED = PLAIN | {"num_key_value_heads": 2, "pad_token_id": 0}
WINDOWS = GROUPED | {"head_dim": 8, "sliding_window": 4}
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
APART = {
    "Olmo2": PLAIN,
    "Cohere": GROUPED,
    "Mistral": GROUPED | {"sliding_window": 4},
    "Phi3": GROUPED | {"sliding_window": 4},
    "Qwen2": GROUPED | {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
    "Gemma2": WINDOWS,
    "Gemma3": {"text_config": WINDOWS, "vision_config": VISION},
    "GptOss": WINDOWS | {"num_local_experts": 2, "num_experts_per_tok": 1},
    "GPTJ": {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "Mpt": {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
}
TOGETHER = {
    "Bloom": {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Mamba": SIZES,
    "Rwkv": SIZES | {"context_length": 64},
}
WITHOUT_LIMIT = {"Bloom", "Mamba"}


def make(folder, kind, fields):
    """Write a model as a stranger would; load it as a run does."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**fields)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    known = read_teacher_config(str(folder))
    return known, load_causal_lm(known, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("kind", [*APART, *TOGETHER])
def test_the_zoo(tmp_path, kind):
    config, model = make(tmp_path, kind, (APART | TOGETHER)[kind])
    assert (config.hidden_size, config.num_layers) == (32, 2)
    assert (config.context > 10**9) == (kind in WITHOUT_LIMIT), config.context
    check_weights(model, str(tmp_path))
    check_states(text_model(model), VOCAB, str(tmp_path))
    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    teacher = Teacher(model, config.context)
    with torch.no_grad():
        states = model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    torch.testing.assert_close(teacher.states_BSD({"tokens": tokens}), states[-1])
    if kind in APART:
        check_documents(text_model(model), VOCAB, LENGTH, str(tmp_path))
    else:
        with pytest.raises(UsageError, match="cannot keep documents apart inside a row"):
            check_documents(text_model(model), VOCAB, LENGTH, str(tmp_path))


@pytest.mark.parametrize("kind", ["Mistral", "Gemma2"])
def test_a_mask_without_the_window_is_noticed(tmp_path, kind, monkeypatch):
    _, model = make(tmp_path, kind, APART[kind])
    monkeypatch.setattr(stage, "_masks_by_kind", lambda config, mask, _: {"full_attention": mask})
    with pytest.raises(UsageError, match="cannot keep documents apart"):
        check_documents(text_model(model), VOCAB, LENGTH, "it")


@pytest.mark.parametrize("window", [4, 14])
@pytest.mark.parametrize("kind", ["Llama", "Cohere", "Olmo2"])
def test_a_window_that_the_model_ignores_is_in_no_mask(tmp_path, kind, window):
    config, model = make(tmp_path, kind, GROUPED | {"sliding_window": window})
    windowed = check_documents(text_model(model), VOCAB, LENGTH, "it")
    teacher = Teacher(model, config.context, windowed=windowed)
    tokens = torch.randint(0, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    later = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
    states = teacher.states_BSD({"tokens": tokens, "attention_mask": later})
    torch.testing.assert_close(states, teacher.states_BSD({"tokens": tokens}))


def test_chunks_that_a_row_reaches_beyond_are_told(tmp_path):
    fields = {
        "attention_chunk_size": 14, "head_dim": 8, "intermediate_size_mlp": 64,
        "num_local_experts": 2, "num_experts_per_tok": 1,
    }  # fmt: skip
    _, model = make(tmp_path, "Llama4Text", GROUPED | fields)
    check_documents(text_model(model), VOCAB, 14, "it")
    with pytest.raises(UsageError, match="does it attend within chunks"):
        check_documents(text_model(model), VOCAB, LENGTH, "it")


@pytest.mark.parametrize("kind", ["Bert", "XLNet"])
def test_what_reads_ahead_is_refused(tmp_path, kind):
    fields = {
        "Bert": PLAIN,
        "XLNet": {"vocab_size": VOCAB, "d_model": 32, "n_layer": 2, "n_head": 4},
    }
    _, model = make(tmp_path, kind, fields[kind])
    with pytest.raises(UsageError, match="is not causal"):
        check_states(text_model(model), VOCAB, "it")


BROKEN = {
    "float8": ("q_proj", lambda weight: weight.to(torch.float8_e4m3fn), "as F8_E4M3: it is q"),
    "int8": ("q_proj", lambda weight: (1000 * weight).to(torch.int8), "as I8: it is quantized"),
    "bool": ("q_proj", lambda weight: weight > 0, "as BOOL: it is quantized"),
    "nan": ("q_proj", lambda weight: weight * torch.nan, "q_proj.weight from nan"),
    "infinite": ("norm", lambda weight: weight / 0, "norm.weight from inf to inf"),
    "huge": ("lm_head", lambda weight: 1e30 * weight, "lm_head.weight from -"),
    "zero": ("embed_tokens", lambda weight: 0 * weight, "an embedding of zeros"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_weights_that_no_training_leaves_are_named(tmp_path, kind):
    part, change, words = BROKEN[kind]
    file = save_tiny_teacher(tmp_path) / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in sorted(weights) if part in name)
    save_file(weights | {name: change(weights[name])}, file, metadata={"format": "pt"})
    model = load_causal_lm(read_teacher_config(str(tmp_path)), torch.float32, torch.device("cpu"))
    with pytest.raises(UsageError, match=words):
        check_weights(model, str(tmp_path))


@pytest.mark.parametrize("form", ["zip", "old", "shard", "hub"])
def test_quantized_weights_are_found_wherever_they_lie(tmp_path, form, monkeypatch):
    folder = tmp_path / "models--a--b" / "snapshots" / "0123"
    file = save_tiny_teacher(folder) / "model.safetensors"
    weights = load_file(file)
    file.unlink()
    name = next(name for name in weights if "q_proj" in name)
    weights[name] = (1000 * weights[name]).to(torch.int8)
    file = folder / ("part.bin" if form == "shard" else "pytorch_model.bin")
    torch.save(weights, file, _use_new_zipfile_serialization=form != "old")
    if form == "shard":
        index = {"weight_map": dict.fromkeys(weights, file.name), "metadata": {}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text("0123")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = load_causal_lm(read_teacher_config(str(folder)), torch.float32, torch.device("cpu"))
    with pytest.raises(UsageError, match="q_proj.weight as int8: it is quantized"):
        check_weights(model, "a/b" if form == "hub" else str(folder))
