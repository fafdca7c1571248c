"""Hugging Face to Megatron and back: the same bytes, for every family; and what is refused."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megatron_let.checkpoint.folder import find_checkpoint
from megatron_let.checkpoint.reader import Checkpoint
from megatron_let.conversion import from_hf, rope
from megatron_let.conversion.from_hf import import_model, open_model
from megatron_let.conversion.to_hf import export
from megatron_let.conversion.tokenizer_files import load_tokenizer
from megatron_let.errors import UsageError
from tests.unit.conversion.hf_models import MODELS, VOCAB, make_model, save_model, write_tokenizer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, as they lie in its files."""
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def assert_same_bits(folder: Path, expected: Path) -> None:
    ours, theirs = weights(folder), weights(expected)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)), name


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_exact(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    original = save_model(name, tmp_path / "hf")
    load = import_model(str(original), tmp_path / "megatron")
    folder = export(load, tmp_path / "back", max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert_same_bits(folder, original)

    caplog.clear()
    recwarn.clear()
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate = True
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer("w5 w6 w7", return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert out.shape == (1, ids["input_ids"].shape[1] + 5)
    assert not caplog.records and not list(recwarn), [r.message for r in caplog.records]
    expected = make_model(name)
    ids_BS = torch.randint(VOCAB, (2, 30))
    torch.testing.assert_close(model(ids_BS).logits, expected(ids_BS).logits, rtol=0, atol=0)


def test_bf16_and_a_cast(tmp_path: Path) -> None:
    model = make_model("llama").bfloat16()
    model.save_pretrained(tmp_path / "hf")
    load = import_model(str(tmp_path / "hf"), tmp_path / "megatron")
    checkpoint = Checkpoint(find_checkpoint(load))
    assert checkpoint.read("output_layer.weight").dtype == torch.bfloat16
    assert_same_bits(export(load, tmp_path / "back"), tmp_path / "hf")
    wide = import_model(str(tmp_path / "hf"), tmp_path / "wide", dtype="fp32")
    assert Checkpoint(find_checkpoint(wide)).read("output_layer.weight").dtype == torch.float32
    again = export(wide, tmp_path / "again", dtype="bf16")
    assert_same_bits(again, tmp_path / "hf")
    # A layer that was kept in more bits than the first one loses none.
    tensors = load_bytes((again / "model.safetensors").read_bytes())  # not mapped
    name = "model.layers.2.mlp.down_proj.weight"
    tensors[name] = tensors[name].float() + 1e-4
    save_file(tensors, again / "model.safetensors")
    mixed = import_model(str(again), tmp_path / "mixed")
    assert torch.equal(weights(export(mixed, tmp_path / "kept"))[name], tensors[name])


def test_names_of_older_folders(tmp_path: Path) -> None:
    """GPT-2's own has no prefix, and buffers that are no weights; an index may be older still."""
    original = save_model("gpt2", tmp_path / "hf")
    tensors = load_bytes((original / "model.safetensors").read_bytes())  # not mapped
    older = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    older["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(older, original / "model.safetensors")
    index = {"weight_map": dict.fromkeys(older, "shard.safetensors")}
    (original / "model.safetensors.index.json").write_text(json.dumps(index))
    load = import_model(str(original), tmp_path / "megatron")
    ours = weights(export(load, tmp_path / "back"))
    assert all(torch.equal(ours[name], tensors[name]) for name in tensors)


def test_a_tied_head_that_was_saved_twice(tmp_path: Path) -> None:
    original = save_model("qwen2", tmp_path / "hf")
    tensors = load_bytes((original / "model.safetensors").read_bytes())  # not mapped
    twice = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(twice, original / "model.safetensors")
    load = import_model(str(original), tmp_path / "megatron")
    assert weights(export(load, tmp_path / "back")).keys() == tensors.keys()
    save_file(
        twice | {"lm_head.weight": twice["lm_head.weight"] + 1}, original / "model.safetensors"
    )
    with pytest.raises(UsageError, match='"tie_word_embeddings": false'):
        import_model(str(original), tmp_path / "other")


def test_dropout_is_carried(tmp_path: Path) -> None:
    """Megatron's default is 0.1; a Llama's is none."""
    for name, flags in (
        ("llama", "--attention-dropout 0.0 --hidden-dropout 0.0"),
        ("gpt2", "--attention-dropout 0.1 --hidden-dropout 0.1"),
    ):
        original = save_model(name, tmp_path / name)
        load = import_model(str(original), tmp_path / f"{name}-megatron")
        assert flags in (load / "megatron_flags.txt").read_text()
        back = AutoConfig.from_pretrained(export(load, tmp_path / f"{name}-back"))
        ours = AutoConfig.from_pretrained(original)
        assert back.to_dict() | {"_name_or_path": ""} == ours.to_dict() | {"_name_or_path": ""}


def test_a_tokenizer_that_the_architecture_would_change(tmp_path: Path) -> None:
    """transformers makes a Qwen2 tokenizer of any files that lie beside a Qwen2 model."""
    original = save_model("qwen2", tmp_path / "hf", tokenizer=False)
    other = write_tokenizer(tmp_path / "other")
    load = import_model(str(original), tmp_path / "megatron")
    folder = export(load, tmp_path / "back", tokenizer_model=str(other))
    assert not (folder / "tokenizer.json").exists()
    expected = AutoTokenizer.from_pretrained(other)
    for tokenizer in (AutoTokenizer.from_pretrained(folder / "tokenizer"), load_tokenizer(folder)):
        assert tokenizer.get_vocab() == expected.get_vocab()
    again = import_model(str(folder), tmp_path / "again")
    assert load_tokenizer(again).get_vocab() == expected.get_vocab()


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_a_tokenizer_that_only_the_configuration_explains(name: str, tmp_path: Path) -> None:
    """Old folders hold GPT-2's two files and no word on whose they are."""
    original = save_model(name, tmp_path / "hf", tokenizer=False)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    (original / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (original / "merges.txt").write_text("#version: 0.2\n")
    load = import_model(str(original), tmp_path / "megatron")
    expected = AutoTokenizer.from_pretrained(original)
    for folder in (load, export(load, tmp_path / "back")):
        assert load_tokenizer(folder)("a b")["input_ids"] == expected("a b")["input_ids"]


def test_older_readers_find_the_positions(tmp_path: Path) -> None:
    """transformers 4 knows no `rope_parameters`, and would not scale, or turn a quarter of each."""
    llama3 = {"rope_type": "llama3", "factor": 4.0} | rope.LLAMA3
    parts = {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 3000.0}}
    for name, changes, older in (
        ("llama", {}, {"rope_theta": 500000.0, "rope_scaling": llama3}),
        ("llama-tied", {}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("gpt_neox", parts, {"rotary_pct": 0.5, "rotary_emb_base": 3000.0}),
    ):
        original = save_model(name, tmp_path / name)
        config = original / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
        folder = export(import_model(str(original), tmp_path / f"{name}-m"), tmp_path / f"{name}-b")
        written = json.loads((folder / "config.json").read_text())
        assert written.items() >= older.items()
        ours, theirs = (AutoConfig.from_pretrained(place) for place in (folder, original))
        assert ours.rope_parameters == theirs.rope_parameters


def test_more_rows_than_tokens_are_kept(tmp_path: Path) -> None:
    original = save_model("llama", tmp_path / "hf", tokenizer=False)
    write_tokenizer(original, VOCAB - 7)
    load = import_model(str(original), tmp_path / "megatron")
    assert_same_bits(export(load, tmp_path / "back"), original)


def test_fewer_rows_than_tokens_are_told_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = save_model("llama", tmp_path / "hf", tokenizer=False)
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(original, VOCAB + 5))
    tokenizer.pad_token = f"w{VOCAB}"  # a common habit: it is learnt by no model
    tokenizer.save_pretrained(original)
    load = import_model(str(original), tmp_path / "megatron")
    assert "ids up to 304 and the model 300 rows, 0 to 299" in capsys.readouterr().err
    folder = export(load, tmp_path / "back")
    assert_same_bits(folder, original)
    assert load_tokenizer(folder).pad_token_id == VOCAB < len(load_tokenizer(folder))


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("gpt_neox", "use_parallel_residual", True, "use_parallel_residual=False only"),
        ("llama", "attention_bias", True, "attention_bias=True cannot be converted"),
        ("llama", "hidden_act", "gelu", "hidden_act='gelu'"),
        ("qwen2", "use_sliding_window", True, "use_sliding_window=True"),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx"),
        ("llama", "model_type", "olmo", "model_type 'olmo' is none of Llama, Qwen2"),
        ("llama", "is_causal", False, "is_causal=False cannot be converted"),
        ("mistral", "sliding_window", 8, "sliding_window=8 cannot be converted"),
        ("smollm3", "no_rope_layers", [1, 0, 1, 0], r"no_rope_layers=\[1, 0, 1, 0\] of 4 layers"),
        ("llama", "num_attention_heads", 8, "has the shape"),
        ("llama", "intermediate_size", 50, r"\(48, 32\); config.json makes it \(50, 32\)"),
        ("llama", "num_hidden_layers", 5, "lacks model.layers.4"),
        ("llama", "num_hidden_layers", 3, "beside the weights of that, model.layers.3"),
        (
            "llama",
            "rope_parameters",
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0},
            "rope_type 'yarn'",
        ),
        (
            "llama",
            "rope_parameters",
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
            "factor of linear scaling 2.5",
        ),
    ],
)
def test_refused(tmp_path: Path, name: str, field: str, value: object, message: str) -> None:
    original = save_model(name, tmp_path / "hf")
    config = original / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: value}))
    with pytest.raises(UsageError, match=message):
        import_model(str(original), tmp_path / "megatron")
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    original = save_model("llama", tmp_path / "hf")
    with pytest.raises(UsageError, match="--revision main has no effect on .*/hf"):
        import_model(str(original), tmp_path / "megatron", revision="main")


def test_how_a_model_would_be_run_is_of_no_account(tmp_path: Path) -> None:
    original = save_model("llama", tmp_path / "hf")
    config = original / "config.json"
    asked = {"_attn_implementation": "flash_attention_2", "dtype": "float8_e4m3fn"}
    config.write_text(json.dumps(json.loads(config.read_text()) | asked))
    assert_same_bits(export(import_model(str(original), tmp_path / "m"), tmp_path / "b"), original)


def test_what_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["config.json", "model-1.safetensors", "consolidated.safetensors", "tokenizer.model"]

    def fetch(_: str, revision: str, **patterns: Any) -> str:
        assert revision == "v0.3"
        assert {*filter_repo_objects(files, **patterns)} == {*files} - {"consolidated.safetensors"}
        return str(tmp_path)

    monkeypatch.setattr(from_hf, "snapshot_download", fetch)
    assert from_hf.local_folder("mistralai/Mistral-7B-v0.3", "v0.3") == tmp_path


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    original = save_model("qwen3", tmp_path / "hf")
    tensors = load_bytes((original / "model.safetensors").read_bytes())  # not mapped
    name = "model.layers.2.self_attn.k_proj.weight"
    for value in (torch.nan, -torch.inf):
        tensors[name][3, 3] = value
        save_file(tensors, original / "model.safetensors")
        with pytest.raises(UsageError, match=f"{name} in .*/hf has values from {value}"):
            import_model(str(original), tmp_path / "megatron")
    tensors[name][3, 3] = 1e5
    save_file(tensors, original / "model.safetensors")
    with pytest.raises(UsageError, match="q.*has values from .* to inf.*too large for torch.float"):
        import_model(str(original), tmp_path / "megatron", dtype="fp16")
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def test_an_adapter_is_not_left_out_unsaid(tmp_path: Path) -> None:
    original = save_model("llama", tmp_path / "hf")
    (original / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="/hf holds an adapter.*merge_and_unload"):
        open_model("--small", str(original))


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "megatron"
    with pytest.raises(UsageError, match="is no folder, and the hub does not give it"):
        import_model(str(tmp_path / "nowhere"), output)
    original = tmp_path / "hf"
    make_model("llama").save_pretrained(original, max_shard_size="60KB")
    shards = sorted(original.glob("*.safetensors"))
    shards[1].write_bytes(shards[1].read_bytes()[:1000])
    with pytest.raises(UsageError, match=rf"{shards[1].name} cannot be read"):
        import_model(str(original), output)
    shards[1].unlink()
    with pytest.raises(UsageError, match=rf"{shards[1].name} cannot be read"):
        import_model(str(original), output)
    for path in original.glob("model*"):
        path.unlink()
    with pytest.raises(UsageError, match="save it with save_pretrained"):
        import_model(str(original), output)
    (original / "config.json").unlink()
    with pytest.raises(UsageError, match="has no configuration to load"):
        import_model(str(original), output)
    assert not output.exists() and not (tmp_path / "megatron.partial").exists()
