import json
import subprocess
import sys

import pytest

from megatron_let.quickstart.tokenizer import END_OF_TEXT, train_tokenizer

SOURCE = '''def add(first: int, second: int) -> int:
    """Return the sum."""
    if first  !=  second :
\t\treturn first + second   # tabs , and  spaces
    return 2 * first
'''
ROUND_TRIP = [
    SOURCE,
    "",
    "  leading and trailing  \n\n",
    "don 't clean , this . up ! n't",
    "caf\u00e9 \u4f60\u597d \U0001f600 \x00\x7f\r\n",
    "a" + END_OF_TEXT + "b",
]


@pytest.fixture
def train_jsonl(tmp_path):
    path = tmp_path / "train.jsonl"
    texts = [SOURCE.replace("add", f"add_{i}").replace("first", "abcdefgh"[i % 8] * 3)
             for i in range(200)]  # fmt: skip
    path.write_text(
        "".join(json.dumps({"text": t, "meta": {"package": "p"}}) + "\n" for t in texts)
    )
    return path


def test_loads_in_transformers_and_gives_back_what_it_got(train_jsonl, tmp_path):
    from transformers import AutoTokenizer

    folder = train_tokenizer(train_jsonl, tmp_path / "tok", vocab_size=320)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == tokenizer.vocab_size == 320
    assert sorted(tokenizer.get_vocab().values()) == list(range(320))
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.unk_token_id == 0
    for text in ROUND_TRIP:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        if END_OF_TEXT not in text:  # nothing is added and nothing is unknown
            assert 0 not in ids
    assert len(tokenizer.encode(SOURCE)) < 0.8 * len(SOURCE)


def test_deterministic_across_processes_and_thread_counts(train_jsonl, tmp_path):
    here = train_tokenizer(train_jsonl, tmp_path / "here", vocab_size=300)
    code = (
        "import sys; from pathlib import Path;"
        "from megatron_let.quickstart.tokenizer import train_tokenizer as t;"
        "t(Path(sys.argv[1]), Path(sys.argv[2]), vocab_size=300)"
    )
    there = tmp_path / "there"
    subprocess.run(
        [sys.executable, "-c", code, str(train_jsonl), str(there)],
        check=True,
        env={"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)},
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "recipe.json"):
        assert (here / name).read_bytes() == (there / name).read_bytes()


def test_reuse_and_refusal(train_jsonl, tmp_path):
    folder = train_tokenizer(train_jsonl, tmp_path / "tok", vocab_size=300)
    before = (folder / "tokenizer.json").stat().st_mtime_ns
    assert train_tokenizer(train_jsonl, folder, vocab_size=300) == folder
    assert (folder / "tokenizer.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="not made from this text"):
        train_tokenizer(train_jsonl, folder, vocab_size=301)
    train_jsonl.write_text(json.dumps({"text": SOURCE}) + "\n")
    with pytest.raises(ValueError, match="not made from this text"):
        train_tokenizer(train_jsonl, folder, vocab_size=300)


def test_bad_input(train_jsonl, tmp_path):
    with pytest.raises(ValueError, match="of 5000 tokens: ask for a smaller"):
        train_tokenizer(train_jsonl, tmp_path / "tok", vocab_size=5000)
    assert not (tmp_path / "tok").exists()
