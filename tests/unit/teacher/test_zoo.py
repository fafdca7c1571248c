"""Every kind of causal language model that transformers has and that can be made tiny.

States are transformers' own, bit for bit but for 1e-5; the loss within 1e-5; no state knows of a
later token; documents are kept apart, or that is refused.
"""

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megatron_let.errors import UsageError
from megatron_let.teacher.load import load_causal_lm, read_teacher_config
from megatron_let.teacher.probe import check_documents, check_states, check_weights
from megatron_let.teacher.stage import Teacher, text_model
from tests.support.zoo import tiny_model

KINDS = (
    "afmoe apertus apertus1p5_text arcee aria_text bamba biogpt bitnet bloom codegen cohere "
    "cohere2 cohere2_moe cwm deepseek_v2 deepseek_v3 diffllama doge dory ernie4_5 ernie4_5_moe "
    "exaone exaone4 exaone_moe falcon falcon_mamba flex_olmo gemma gemma2 gemma3_text gemma4_text "
    "gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite gpt-sw3 gpt2 gpt_bigcode gpt_neox "
    "gpt_neox_japanese gptj granite granite_swa granitemoe granitemoe_swa granitemoehybrid "
    "granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v4 hyperclovax internlm3 "
    "iquestcoder jais2 lara_mini lfm2 lfm3 llama llama4_text mamba mellum minicpm3 minimax "
    "ministral ministral3 mistral mixtral modernbert-decoder moshi mpt nanochat nemotron olmo "
    "olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 "
    "qwen3_5_text qwen3_moe recurrent_gemma rwkv sarvam_mla sarvam_moe seed_oss smollm3 "
    "solar_open stablelm starcoder2 vaultgemma xglm xlstm zaya "
).split()
RECURRENT = (
    "bamba falcon_mamba granitemoehybrid lfm3 mamba minimax olmo_hybrid qwen3_5_text "
    "recurrent_gemma rwkv xlstm zaya"
).split()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_states_and_loss_are_transformers_own(kind, tmp_path):
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip("this version of transformers does not have it")
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    config = read_teacher_config(str(tmp_path))
    loaded = load_causal_lm(config, torch.float32, torch.device("cpu"))
    check_weights(loaded, str(tmp_path))
    check_states(text_model(loaded), config.vocab_size, str(tmp_path))
    ids = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        own = model(input_ids=ids, labels=ids, output_hidden_states=True, use_cache=False)
    teacher = Teacher(loaded, config.context)
    loss = teacher.lm_loss({"tokens": ids[:, :-1]}, ids[:, 1:], torch.ones(2, 23))
    assert loss == pytest.approx(own.loss.item(), abs=1e-5)
    states = teacher.states_BSD({"tokens": ids})
    assert (states - own.hidden_states[-1]).abs().max() <= 1e-5
    try:
        windowed = check_documents(text_model(loaded), config.vocab_size, 24, str(tmp_path))
    except UsageError:
        return
    assert kind not in RECURRENT
    rows = {"tokens": ids, "attention_mask": torch.ones(2, 1, 24, 24).triu(1).bool()}
    masked = Teacher(loaded, config.context, windowed=windowed).states_BSD(rows)
    assert (masked - states).abs().max() <= 1e-3


def test_the_zoo_is_large():
    assert len(KINDS) >= 60
