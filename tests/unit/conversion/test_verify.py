"""--verify: Megatron's own logits, and what it refuses."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megatron_let.checkpoint.folder import find_checkpoint
from megatron_let.commands.convert_checkpoint import main
from megatron_let.conversion import from_hf
from megatron_let.conversion import verify as verify_module
from megatron_let.conversion.from_hf import import_model
from megatron_let.conversion.to_hf import export
from megatron_let.conversion.verify import TOLERANCE, compare, verify
from megatron_let.errors import UsageError
from tests.support.testing import run_program
from tests.unit.conversion.hf_models import MODELS, VOCAB, make_model, save_model


@pytest.fixture(autouse=True)
def _megatron_is_imported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's own process is a fork of one that has it."""

    def run(command: list[object], **_: object) -> object:
        _, minus_m, *program = map(str, command)
        assert minus_m == "-m"
        return run_program(*program)

    monkeypatch.setattr(verify_module.subprocess, "run", run)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name != "qwen3"]


@pytest.mark.slow
def test_a_cast_is_not_held_against_the_conversion(tmp_path: Path) -> None:
    original = save_model("llama", tmp_path / "hf")
    load = find_checkpoint(import_model(str(original), tmp_path / "fp32"))
    narrow = export(tmp_path / "fp32", tmp_path / "bf16", dtype="bf16")
    assert verify(load, narrow).relative < TOLERANCE
    load = find_checkpoint(import_model(str(original), tmp_path / "megatron", dtype="bf16"))
    assert verify(load, original).relative < TOLERANCE


def test_the_stored_types_decide_what_is_rounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what the configuration says of them."""
    original = save_model("llama", tmp_path / "hf")
    load = find_checkpoint(import_model(str(original), tmp_path / "megatron"))
    config = original / "config.json"
    config.write_text(config.read_text().replace("float32", "float16"))
    asked = []

    def ones(checkpoint: Path, ids_BS: torch.Tensor, rounded_to: torch.dtype) -> torch.Tensor:
        asked.append(rounded_to)
        return torch.ones(*ids_BS.shape, VOCAB)

    monkeypatch.setattr(verify_module, "_megatron_logits", ones)
    tensors = load_bytes((original / "model.safetensors").read_bytes())  # not mapped
    mixed = {n: t if "norm" in n else t.bfloat16() for n, t in tensors.items()}
    for saved in (tensors, mixed, {n: t.bfloat16() for n, t in tensors.items()}):
        save_file(saved, original / "model.safetensors")
        with pytest.raises(UsageError, match="do not compute the same"):
            verify(load, original)
    assert asked == [torch.float32, torch.float32, torch.bfloat16]


def test_a_tokenizer_that_reads_no_english(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "hf")
    words = Tokenizer(models.BPE({"\u4e16": 0}, []))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    assert verify_module._token_ids(folder, make_model("llama").config).shape == (1, 128)


def test_zeros_prove_nothing() -> None:
    with pytest.raises(UsageError, match="all logits are zero"):
        compare(torch.zeros(1, 2, VOCAB), torch.zeros(1, 2, VOCAB))


@pytest.mark.parametrize("name", ["qwen3", *SLOW])
def test_megatron_computes_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = save_model(name, tmp_path / "hf")
    # As a run on GPUs has saved it: nothing of that can be done here, or changes the function.
    fast = {"defer_embedding_wgrad_compute": True, "te_precision_config_file": "gone"}
    fast |= {"fp8_param_gather": True, "fp8": "e4m3", "use_te_activation_func": True}
    objects = from_hf._objects
    monkeypatch.setattr(from_hf, "_objects", lambda values: objects(fast | values))
    load = find_checkpoint(import_model(str(original), tmp_path / "megatron"))
    ask, answers = verify_module._megatron_logits, []

    def remembered(*args):
        answers.append(answers[0] if answers else ask(*args))
        return answers[-1]

    monkeypatch.setattr(verify_module, "_megatron_logits", remembered)
    difference = verify(load, original)
    print(f"{name}: {difference}")
    assert 0 < difference.relative < TOLERANCE and difference.same_choice == 1

    # Twin: against the same answer, one bias or norm that was forgotten is refused.
    tensors = load_bytes((original / "model.safetensors").read_bytes())  # not mapped
    forgotten = next(key for key in sorted(tensors) if "norm" in key or ".ln_" in key)
    save_file(tensors | {forgotten: tensors[forgotten] * 0 + 1}, original / "model.safetensors")
    with pytest.raises(UsageError, match="do not compute the same"):
        verify(load, original)


def test_a_checkpoint_that_megatron_cannot_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = save_model("llama", tmp_path / "hf")
    load = import_model(str(original), tmp_path / "megatron")
    (data,) = (load / "release").glob("*.distcp")
    data.write_bytes(data.read_bytes()[:50000])
    with pytest.raises(SystemExit) as stop:
        main(f"to-hf --load {load} --output {tmp_path / 'back'} --verify".split())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "has 50000 of" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "back").exists()
