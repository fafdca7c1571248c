"""What a teacher is refused for before the first step, from outside of its weights."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megatron_let.errors import UsageError
from megatron_let.teacher import host
from megatron_let.teacher.load import read_teacher_config
from tests.support.testing import save_tiny_teacher

WORDS = {f"w{i}": i for i in range(72)}
ARGS = {
    "reset_position_ids": False, "reset_attention_mask": False, "transformer_impl": "local",
    "position_embedding_type": "rope", "create_attention_mask_in_dataloader": True,
    "seq_length": 16, "teacher_seq_length": None, "teacher_dtype": None,
    "params_dtype": torch.float16,
}  # fmt: skip


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A function that makes the host of a teacher with so many rows, and 72 tokens and more."""
    monkeypatch.setattr(host, "get_tokenizer", lambda: SimpleNamespace(eod=1))

    def make(rows, *special):
        save_tiny_teacher(tmp_path, vocab_size=rows, width=16)
        words = Tokenizer(models.WordLevel(WORDS, unk_token="w0"))
        words.add_special_tokens(list(special))
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
        return host.TeacherHost(Namespace(**ARGS), read_teacher_config(str(tmp_path)), None)

    return make


def test_each_id_needs_a_row_of_the_teachers(made, monkeypatch):
    made(72).check_tokens(WORDS, same=True)
    few = made(64)
    with pytest.raises(UsageError, match="knows 64 token ids, and would be given ids up to 71"):
        few.check_tokens(WORDS, same=True)
    made(72, "<image>").check_tokens(WORDS | {"<image>": 72}, same=True)  # as Gemma 3
    few = made(64)
    other = SimpleNamespace(largest_id=lambda: 65)  # where the teacher's own tokens are read
    monkeypatch.setattr(host, "Translation", lambda *_: other)
    with pytest.raises(UsageError, match="knows 64 token ids, and would be given ids up to 65"):
        few.check_tokens({"w1": 0}, same=False)


def test_a_loss_that_overflows_ends_all_ranks(made, monkeypatch):
    """This one has no teacher; rank 1 has."""
    facts = {"lm_loss": float("nan"), "stages": [1]}

    def gather(places, own):
        places[:] = [own, (facts, [])]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(
        UsageError, match=r"loss of nan .* in torch.float16: .*--teacher-dtype bf16 or fp32"
    ):
        made(72).share([])
    facts["lm_loss"] = 5.0
    made(72).share([])
