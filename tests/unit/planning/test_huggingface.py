import json

import pytest

from megatron_let.errors import UsageError
from megatron_let.planning.shapes import TEACHERS, from_hf_config, teacher_shape

# As the released checkpoints have them.
PARAMETERS = {
    "smollm-135m": 134_515_008,
    "opt-125m": 125_239_296,
    "pythia-160m": 162_322_944,
    "llama-3.2-1b": 1_235_814_400,
    "gpt2": 124_439_808,
}
QWEN2_5_05B = {
    "model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936,
    "max_position_embeddings": 32768, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_06B = {
    "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "head_dim": 128,
    "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 3072,
    "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": True,
}  # fmt: skip

MISTRAL_7B = {
    "model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "vocab_size": 32000, "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip
SMOLLM3_3B = {
    "model_type": "smollm3", "hidden_size": 2048, "num_hidden_layers": 36,
    "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 11008,
    "vocab_size": 128256, "max_position_embeddings": 65536,
}  # fmt: skip


def test_parameters_of_the_known_teachers():
    assert {name: teacher_shape(name).parameters for name in TEACHERS} == PARAMETERS


def test_only_the_untied_teacher_has_a_head_of_its_own():
    heads = {
        name: teacher_shape(name).parameters - teacher_shape(name).parameters_without_head
        for name in TEACHERS
    }
    assert heads == dict.fromkeys(TEACHERS, 0) | {"pythia-160m": 50304 * 768}


@pytest.mark.parametrize(
    "config, parameters",
    [
        (QWEN2_5_05B, 494_032_768),
        (QWEN3_06B, 596_049_920),
        (MISTRAL_7B, 7_241_732_096),
        (SMOLLM3_3B, 3_075_098_624),
    ],
)
def test_parameters_of_others(config, parameters):
    assert from_hf_config(config, name="it").parameters == parameters


def test_a_hub_id_is_known_by_its_last_part():
    assert teacher_shape("HuggingFaceTB/SmolLM-135M") == teacher_shape("smollm-135m")


def test_a_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TEACHERS["opt-125m"]))
    shape = teacher_shape(str(tmp_path))
    assert shape.parameters == PARAMETERS["opt-125m"]
    assert shape.name == tmp_path.name and shape.context == 2048


def test_biases_that_a_config_turns_on():
    plain = from_hf_config(TEACHERS["smollm-135m"], name="plain")
    config = TEACHERS["smollm-135m"] | {"attention_bias": True, "mlp_bias": True}
    biased = from_hf_config(config, name="biased")
    # Queries 576, keys and values 192 each, output 576; gate and up 1536 each, down 576.
    assert biased.parameters - plain.parameters == 30 * (576 + 384 + 576 + 3072 + 576)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "mamba"}, "is a mamba; known on paper are llama"),
        ({"hidden_size": None}, "lacks a size"),
        ({"num_attention_heads": 0, "num_key_value_heads": 0}, "lacks a size"),
        ({"num_hidden_layers": 0}, "num_layers 0 must be at least 1"),
    ],
)
def test_unusable_configs(change, message):
    with pytest.raises(UsageError, match=message):
        from_hf_config(TEACHERS["smollm-135m"] | change, name="odd")


def test_opt_350m_is_refused():
    with pytest.raises(UsageError, match="word_embed_proj_dim 512"):
        from_hf_config(TEACHERS["opt-125m"] | {"word_embed_proj_dim": 512}, name="opt-350m")


def test_neither_folder_nor_name(tmp_path):
    with pytest.raises(UsageError, match="neither a folder nor a known name. Choose smollm-135m"):
        teacher_shape("smollm-999m")
    with pytest.raises(UsageError, match="config.json cannot be read"):
        teacher_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UsageError, match="not an object"):
        teacher_shape(str(tmp_path))
