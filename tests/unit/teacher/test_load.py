import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    T5Config,
)

from megatron_let import hugging_face
from megatron_let.errors import MachineError, UsageError
from megatron_let.hugging_face import told
from megatron_let.teacher.load import (
    TokenIds,
    check_token_ids,
    differing,
    fingerprint,
    load_causal_lm,
    numbers_alike,
    read_teacher_config,
    read_token_ids,
)
from tests.support.testing import ARCHITECTURES, save_tiny_teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Llama without a tokenizer."""
    return save_tiny_teacher(tmp_path_factory.mktemp("llama"), vocab_size=64, width=16)


def load(folder):
    return load_causal_lm(read_teacher_config(str(folder)), torch.float32, CPU)


def change_weights(source, folder, change):
    """Copy a teacher with its weights changed by `change(dict)`."""
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (500, MachineError, "the hub is away: its answer"),
        (429, MachineError, "the hub is away"),
        (None, MachineError, "the hub is away"),
        (403, UsageError, "the hub answers 403: .*hf auth login"),
        (404, UsageError, r"\(no such file\)"),
    ],
)
def test_a_hub_that_is_away_may_come_back(answer, kind, words):
    cause = ConnectionRefusedError("its answer") if answer is None else OSError("its answer")
    cause.response = answer and SimpleNamespace(status_code=answer)
    with pytest.raises(UsageError, match=words) as error, told("org/model"):
        raise OSError("no such file.\nMore of it") from cause
    assert type(error.value) is kind


def test_an_offline_hub_does_not_come_back():
    with pytest.raises(UsageError, match="no such file") as error, told("org/model"):
        raise OSError("no such file") from OfflineModeIsEnabled("offline")
    assert type(error.value) is UsageError


# --- configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_width_context_and_vocabulary_of_every_architecture(architecture, tmp_path):
    save_tiny_teacher(tmp_path, architecture, vocab_size=72, width=24)
    config = read_teacher_config(str(tmp_path))
    assert (config.hidden_size, config.context, config.vocab_size) == (24, 128, 72)
    assert (config.num_layers, config.width(1), config.width(None)) == (2, 24, 24)
    assert not read_token_ids(str(tmp_path))  # no tokenizer in the folder, none made up


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"--teacher-model .*/nowhere: there is no such folder"):
        read_teacher_config(str(tmp_path / "nowhere"))


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(hugging_face.Path, "is_file", denied)  # root may read everything
    with pytest.raises(UsageError, match="is not a readable model folder: .*Permission denied"):
        read_teacher_config(str(tmp_path))


def test_a_revision_of_a_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--teacher-revision v2 has no effect on .* lies here"):
        read_teacher_config(str(tmp_path), "v2")


def test_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"not a readable model folder: .* config.json"):
        read_teacher_config(str(tmp_path))


def test_encoders_are_refused(tmp_path):
    bert = BertConfig(
        vocab_size=32,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    BertModel(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(UsageError, match="is a BertModel, not a causal language model. Choose"):
        read_teacher_config(str(tmp_path / "bert"))
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path / "t5")
    with pytest.raises(UsageError, match="is a T5ForConditionalGeneration, not a causal"):
        read_teacher_config(str(tmp_path / "t5"))
    BartConfig(architectures=["BartForCausalLM"]).save_pretrained(tmp_path / "bart")
    with pytest.raises(UsageError, match="is a bart, half of which reads what the other half"):
        read_teacher_config(str(tmp_path / "bart"))


def test_early_names_of_architectures_are_known(folder, tmp_path):
    written = json.loads((folder / "config.json").read_text())
    written["architectures"] = ["LLaMAForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert read_teacher_config(str(tmp_path)).hidden_size == 16


# --- weights ------------------------------------------------------------------------------------


def test_teacher_is_frozen_in_evaluation_mode_and_of_the_asked_precision(folder):
    model = load_causal_lm(read_teacher_config(str(folder)), torch.bfloat16, CPU)
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loading_leaves_every_random_number_generator_as_it_was(architecture, tmp_path):
    save_tiny_teacher(tmp_path, architecture)
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])


def test_missing_weights_are_refused_instead_of_drawn(folder, tmp_path):
    def remove(weights):
        del weights["model.layers.1.mlp.up_proj.weight"]

    broken = change_weights(folder, tmp_path / "broken", remove)
    with pytest.raises(UsageError, match=r"lacks 1 weights .*layers.1.mlp.up_proj.weight"):
        load(broken)


def test_a_folder_without_weights_says_which_file_it_needs(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UsageError, match=r"could not be loaded.*model.safetensors"):
        load(tmp_path)


def test_a_quantized_model_is_not_said_to_lack_a_file(folder, tmp_path):
    copy = change_weights(folder, tmp_path / "copy", lambda weights: None)
    written = json.loads((copy / "config.json").read_text())
    written["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (copy / "config.json").write_text(json.dumps(written))
    with pytest.raises(UsageError, match="loaded. They are quantized: .* full precision"):
        load(copy)


def test_weights_of_another_shape_are_refused(folder, tmp_path):
    def cut(weights):
        weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()

    with pytest.raises(UsageError, match="lacks 1 weights .* such as model.norm.weight"):
        load(change_weights(folder, tmp_path / "cut", cut))


def test_an_adapter_is_not_followed_to_another_model(folder, tmp_path):
    copy = change_weights(folder, tmp_path / "copy", lambda weights: None)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(folder)}
    (copy / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(UsageError, match="copy holds an adapter.*merge_and_unload"):
        load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(UsageError, match="copy holds an adapter"):
        read_teacher_config(str(copy))


# --- fingerprint --------------------------------------------------------------------------------


def test_fingerprint_is_the_same_at_every_load(folder):
    assert fingerprint(load(folder)) == fingerprint(load(folder))


def test_fingerprint_changes_with_any_weight(folder):
    model = load(folder)
    seen = {fingerprint(model)}
    weights = list(model.parameters())
    for weight in weights:
        with torch.no_grad():
            weight.view(-1)[-1] += 1e-3
        seen.add(fingerprint(model))
    assert len(seen) == len(weights) + 1


# --- token ids ----------------------------------------------------------------------------------


def test_tokenizer_of_the_folder_is_read(folder, tmp_path):
    words = {"a": 0, "b": 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert read_token_ids(str(tmp_path)) == words


def test_equal_ids_and_a_larger_vocabulary_are_fine():
    check_token_ids({"a": 0, "b": 1}, TokenIds({"a": 0, "b": 1}), "teacher")
    more = TokenIds({"a": 0, "b": 1, "c": 2})
    with pytest.raises(UsageError, match="has learnt tokens that .* lacks, such as 'c'"):
        check_token_ids({"a": 0, "b": 1}, more, "teacher")  # a longer list of the same merges, say
    assert not numbers_alike({"a": 0, "b": 1}, more)
    more.added = frozenset({"c"})
    check_token_ids({"a": 0, "b": 1}, more, "teacher")
    assert numbers_alike({"a": 0, "b": 1}, more)


@pytest.mark.parametrize(
    ("teacher", "told"), [({"a": 0, "b": 2}, "'b' is 1 .* and 2"), ({"a": 0}, "'b' .* absent")]
)
def test_another_id_and_an_absent_token_are_named(teacher, told):
    with pytest.raises(UsageError, match=told) as error:
        check_token_ids({"a": 0, "b": 1}, TokenIds(teacher), "small-model")
    assert "--tokenizer-model small-model" in str(error.value)


def test_same_size_in_another_order_is_no_match():
    with pytest.raises(UsageError):
        check_token_ids({"a": 0, "b": 1}, TokenIds({"a": 1, "b": 0}), "teacher")
    # Transformers calls Gemma's byte 9 a tab.
    assert not any(differing({"a": 0, "<0x09>": 1}, {"a": 0, "\t": 1}))
    assert any(differing({"a": 0, "b": 1}, {"a": 0, "\t": 1}))


def test_a_table_with_padding_rows_loads(folder):
    """64 rows for two tokens: the table's size is not the tokenizer's."""
    assert read_teacher_config(str(folder)).vocab_size == 64
    check_token_ids({"a": 0, "b": 1}, TokenIds({"a": 0, "b": 1}), str(folder))
    assert isinstance(
        load(folder), AutoModelForCausalLM._model_mapping[load(folder).config.__class__]
    )
