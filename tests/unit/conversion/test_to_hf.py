"""The whole export on a small made-up checkpoint, and everything it refuses."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from megatron_let.checkpoint.folder import SUMS
from megatron_let.checkpoint.reader import Checkpoint
from megatron_let.commands.convert_checkpoint import main
from megatron_let.conversion.configs import (
    FLAG_OF,
    MUST_BE_OFF,
    NEEDED_BY_ALL,
    family_of_run,
    megatron_flags,
)
from megatron_let.conversion.families import FAMILIES
from megatron_let.conversion.to_hf import export, sample
from megatron_let.conversion.tokenizer_files import load_tokenizer
from megatron_let.data.tokenizer import tokenizer_fingerprint
from megatron_let.errors import UsageError
from tests.unit.conftest import VOCAB_SIZE, MadeCheckpoint

ROOT = Path(__file__).resolve().parents[3]
IDS = torch.tensor([[1, 5, 2, 8, 10, 0]])


def write_tokenizer(folder: Path, size: int = VOCAB_SIZE) -> Path:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w10").save_pretrained(folder)
    return folder


def test_gives_back_the_model(made: MadeCheckpoint, tmp_path: Path) -> None:
    folder = export(made.save, tmp_path / "hf")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = made.model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    torch.testing.assert_close(model(IDS).logits, made.model(IDS).logits, rtol=0, atol=0)
    assert model.config.rope_parameters == made.model.config.rope_parameters
    assert model.config.bos_token_id is model.config.eos_token_id is None
    assert json.loads((folder / "config.json").read_text())["rope_theta"] == 5000.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "save"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_tied_embeddings(made: MadeCheckpoint, tmp_path: Path) -> None:
    made.args.untie_embeddings_and_output_weights = False
    del made.state["output_layer.weight"]
    (made.save / "iter_0000007" / ".metadata").unlink()
    made.write()
    model = AutoModelForCausalLM.from_pretrained(export(made.save, tmp_path / "hf"))
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, made.model.model.embed_tokens.weight)


def test_dtype_and_shards(made: MadeCheckpoint, tmp_path: Path) -> None:
    folder = export(made.save, tmp_path / "hf", dtype="bf16", max_shard_size="1KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    expected = made.model.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name].bfloat16()), name


@pytest.mark.parametrize(("value", "dtype"), [(torch.nan, None), (1e5, "fp16")])
def test_what_is_not_finite_is_named(
    made: MadeCheckpoint, tmp_path: Path, value: float, dtype: str | None
) -> None:
    made.state["output_layer.weight"][3, 3] = value
    made.write()
    with pytest.raises(UsageError, match="lm_head.weight has values from .*diverged"):
        export(made.save, tmp_path / "hf", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["save"]


def test_tokenizer_of_the_run_is_copied(made: MadeCheckpoint, tmp_path: Path) -> None:
    source = write_tokenizer(tmp_path / "tokenizer")
    made.args.tokenizer_type = "HuggingFaceTokenizer"
    made.args.tokenizer_model = str(source)
    made.args.vocab_size = None
    made.write()
    folder = export(made.save, tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("w3 w10")["input_ids"] == [3, 10]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 10
    assert sample(folder, "w3").startswith("w3 w")
    with pytest.raises(UsageError, match="has no tokens"):
        sample(folder, "")
    assert len(sample(folder, "w3 " * 31).split()) == 32  # all that the model reads
    with pytest.raises(UsageError, match="--sample has 32 tokens.* reads fewer than 32"):
        sample(folder, "w3 " * 32)

    source.rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="--tokenizer-model"):
        export(made.save, tmp_path / "hf2")
    moved = export(made.save, tmp_path / "hf2", tokenizer_model=str(tmp_path / "moved"))
    assert len(AutoTokenizer.from_pretrained(moved)) == VOCAB_SIZE


@pytest.mark.parametrize("size", [40, 17])
def test_another_tokenizer_is_refused(made: MadeCheckpoint, tmp_path: Path, size: int) -> None:
    other = str(write_tokenizer(tmp_path / "tokenizer", size))
    del made.args.pad_vocab_size  # as Megatron-LM before 0.19, which always pads
    made.write()
    with pytest.raises(UsageError, match=f"has {size} tokens, padded to .* model has 16"):
        export(made.save, tmp_path / "hf", tokenizer_model=other)
    assert not (tmp_path / "hf").exists()


def test_the_fingerprint_of_the_run_decides(made: MadeCheckpoint, tmp_path: Path) -> None:
    """The same size and other tokens: only a checkpoint of this project can tell."""
    source = write_tokenizer(tmp_path / "tokenizer")
    vocabulary = AutoTokenizer.from_pretrained(source).get_vocab()
    made.args.tokenizer_fingerprint = tokenizer_fingerprint(vocabulary)
    made.write()
    export(made.save, tmp_path / "hf", tokenizer_model=str(source))
    made.args.tokenizer_fingerprint = tokenizer_fingerprint(vocabulary | {"w3": 4, "w4": 3})
    made.write()
    with pytest.raises(UsageError, match="is not the one the model was trained with"):
        export(made.save, tmp_path / "other", tokenizer_model=str(source))
    assert not (tmp_path / "other").exists()


def test_rows_that_the_run_was_given_are_believed(made: MadeCheckpoint, tmp_path: Path) -> None:
    """--padded-vocab-size: no padding of the tokenizer's size gives the rows of the model."""
    source = write_tokenizer(tmp_path / "tokenizer")
    made.args.tokenizer_type, made.args.tokenizer_model = "HuggingFaceTokenizer", str(source)
    made.args.vocab_size, made.args.make_vocab_size_divisible_by = None, 100
    made.write()
    assert (export(made.save, tmp_path / "hf") / "tokenizer.json").is_file()
    source.rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="If the run set --padded-vocab-size"):
        export(made.save, tmp_path / "other", tokenizer_model=str(tmp_path / "moved"))


def test_a_token_behind_a_gap_keeps_its_row(made: MadeCheckpoint, tmp_path: Path) -> None:
    source = write_tokenizer(tmp_path / "tokenizer")
    with_gap = (source / "tokenizer.json").read_text().replace('"w9": 9', '"w9": 13')
    (source / "tokenizer.json").write_text(with_gap)
    made.args.vocab_size = None
    made.write()
    folder = export(made.save, tmp_path / "hf", tokenizer_model=str(source))
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 14


def test_special_tokens_of_the_run_are_the_exports(made: MadeCheckpoint, tmp_path: Path) -> None:
    """--tokenizer-special-tokens: Megatron adds them to what it loads from the folder."""
    source = write_tokenizer(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>"]})
    made.args.special_tokens = ["<a>", "<b>"]
    made.args.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer.get_vocab())
    made.write()
    folder = export(made.save, tmp_path / "hf", tokenizer_model=str(source))
    assert AutoTokenizer.from_pretrained(folder)("w3<b>")["input_ids"] == [3, VOCAB_SIZE + 1]


def test_tokenizer_without_a_folder_is_refused(made: MadeCheckpoint, tmp_path: Path) -> None:
    made.args.tokenizer_type = "GPT2BPETokenizer"
    made.write()
    with pytest.raises(UsageError, match="--tokenizer-type GPT2BPETokenizer"):
        export(made.save, tmp_path / "hf")


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("normalization", "LayerNorm", "normalization='LayerNorm' (--normalization)"),
        ("swiglu", False, "swiglu=False (--swiglu)"),
        ("position_embedding_type", "learned_absolute", "position_embedding_type="),
        ("rotary_percent", 0.5, "rotary_percent=0.5 (--rotary-percent)"),
        ("rotary_interleaved", True, "rotary_interleaved=True (--rotary-interleaved)"),
        ("add_bias_linear", True, "add_bias_linear=True (--disable-bias-linear)"),
        ("num_experts", 8, "--num-experts 8"),
        ("multi_latent_attention", True, "--multi-latent-attention True"),
        ("window_size", (128, 0), "--window-size (128, 0)"),
        ("no_rope_freq", 2, "no_rope_freq=2 (--no-rope-freq)"),
    ],
)
def test_other_models_are_refused(
    made: MadeCheckpoint, attribute: str, value: Any, message: str
) -> None:
    args = made.args
    assert family_of_run(args).name == "Llama"
    vars(args)[attribute] = value
    with pytest.raises(UsageError) as error:
        family_of_run(args)
    assert str(error.value).startswith(message)
    assert "Llama" in str(error.value)


def test_the_arguments_tell_the_family(made: MadeCheckpoint) -> None:
    for changes, name in (
        ({"add_qkv_bias": True}, "Qwen2"),
        ({"qk_layernorm": True}, "Qwen3"),
        ({"no_rope_freq": 4}, "SmolLM3"),
        ({"normalization": "LayerNorm", "swiglu": False, "add_bias_linear": True}, None),
    ):
        args = argparse.Namespace(**vars(made.args) | changes)
        if name is not None:
            assert family_of_run(args).name == name
    gpt = changes | {"group_query_attention": False, "add_qkv_bias": True}
    for position, name in (("learned_absolute", "GPT-2"), ("rope", "GPT-NeoX")):
        args = argparse.Namespace(**vars(made.args) | gpt | {"position_embedding_type": position})
        assert family_of_run(args).name == name


def test_flags_exist_and_mean_what_they_say() -> None:
    """A renamed argument would be let through unseen."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    destinations = {action.dest: action.option_strings for action in parser._actions}
    flags = FLAG_OF | MUST_BE_OFF
    assert not {a: f for a, f in flags.items() if f not in destinations.get(a, [])}
    for family in FAMILIES:
        values = {**NEEDED_BY_ALL, **family.needs, "use_rope_scaling": True, "kv_channels": 24}
        values |= {"group_query_attention": True, "num_query_groups": 2}
        values |= {"bias_gelu_fusion": False, "layernorm_epsilon": 3e-6}
        parsed = vars(parser.parse_args(megatron_flags(values)))
        assert {name: parsed[name] for name in values} == values


def test_another_shape_is_refused(made: MadeCheckpoint, tmp_path: Path) -> None:
    made.args.ffn_hidden_size = 16
    made.write()
    with pytest.raises(UsageError, match=r"gate_proj.weight has the shape \(12, 8\)"):
        export(made.save, tmp_path / "hf")


def test_nothing_is_overwritten_and_no_piece_is_left(
    made: MadeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "hf"
    output.mkdir()
    (output / "note.txt").write_text("mine")
    with pytest.raises(UsageError, match="nothing is overwritten"):
        export(made.save, output)
    (output / "note.txt").unlink()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "read", fail)
        with pytest.raises(OSError, match="disk full"):
            export(made.save, output)  # an empty folder is fine
    assert not any(output.iterdir()) and not (tmp_path / "hf.partial").exists()
    (tmp_path / "hf.partial").mkdir()
    assert export(made.save, output) == output


@pytest.mark.slow
def test_command_line_works_from_anywhere(made: MadeCheckpoint, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    command = [sys.executable, ROOT / "tools" / "convert_checkpoint.py", "to-hf", "--load"]
    command += [made.save, "--output", "hf", "--tokenizer-model", tokenizer, "--sample", "w3 w4"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    wrote, text = result.stdout.splitlines()
    assert wrote == f"Wrote hf, of {made.save}/iter_0000007" and text.startswith("w3 w4 w")
    assert (tmp_path / "hf" / "config.json").exists()


def test_command_line_gives_one_paragraph_for_a_mistake(
    made: MadeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "hf")
    with pytest.raises(SystemExit) as stop:
        main(["to-hf", "--load", str(made.save), "--output", output, "--ckpt-step", "3"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("megatron-let convert: error: No whole checkpoint at ")
    assert len(error.splitlines()) == 1


def test_the_step_is_told(
    made: MadeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (made.save / "iter_0000009").mkdir()  # cut, or still being written
    main(["to-hf", "--load", str(made.save), "--output", str(tmp_path / "hf")])
    assert capsys.readouterr().out == f"Wrote {tmp_path}/hf, of {made.save}/iter_0000007\n"


def test_a_damaged_checkpoint_is_not_exported(
    made: MadeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (made.save / "iter_0000007" / SUMS).write_text('{"files": {"__0_0.distcp": "another"}}')
    with pytest.raises(SystemExit):
        main(["to-hf", "--load", str(made.save), "--output", str(tmp_path / "hf")])
    assert "iter_0000007 is damaged: the SHA-256 of __0_0.distcp" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UsageError, match="cannot be loaded. .it has special tokens alone"):
        load_tokenizer(tmp_path)
