"""Preprocessing's tokenizers are Megatron's, and start without Megatron, torch or any model."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, DType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_let.data import indexed
from megatron_let.data.tokenizer import TokenizerConfig, load_tokenizer
from megatron_let.upstream.mended import token_ids
from tests.unit.data.test_engines import byte_level, hard_texts, metaspace, sentencepiece_model

ROOT = Path(__file__).resolve().parents[3]
EOD = "<|endoftext|>"
CLASSES = (
    "TokenizersBackend",
    "PreTrainedTokenizerFast",
    "GPT2Tokenizer",
    "Qwen2Tokenizer",
    "GPTNeoXTokenizerFast",
    "LlamaTokenizer",
)
LOAD = """
import hashlib, json, sys
from megatron_let.data.tokenizer import TokenizerConfig, load_tokenizer, without_models
if "--lean" in sys.argv:
    without_models()
for folder in sys.argv[2:]:
    tokenizer = load_tokenizer(TokenizerConfig(tokenizer_model=folder))
    backend = hashlib.sha256(tokenizer.fast.to_str().encode()).hexdigest()
    print(json.dumps([tokenizer.eod, tokenizer.vocab_size, backend, type(tokenizer.fast).__name__]))
print(json.dumps([name for name in ("torch", "megatron") if sys.modules.get(name)]))
"""


def megatrons(config: TokenizerConfig) -> Any:
    flags = Namespace(**vars(config))
    flags.special_tokens = list(config.special_tokens or ()) or None
    flags.tokenizer_sentencepiece_ignore_extra_whitespaces = True
    flags.chat_template = flags.metadata_path = None
    flags.pad_vocab_size = False
    return build_tokenizer(flags)


def separators_only(folder: Path, **names: str) -> TokenizerConfig:
    """A tokenizer of BERT's kind, whose separator and class token stand for end and start."""
    tokens = ["[UNK]", "[SEP]", "[CLS]", "a", "b", "##b"]
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    around = [("[SEP]", 1), ("[CLS]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, around)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return TokenizerConfig(tokenizer_model=str(folder))


def with_flags(config: TokenizerConfig, **flags: Any) -> TokenizerConfig:
    return TokenizerConfig(**vars(config) | flags)


CASES = {
    "bytes": byte_level,
    "start token": lambda folder: byte_level(folder, bos=True),
    "without it": lambda folder: with_flags(
        byte_level(folder, bos=True), tokenizer_hf_no_include_special_tokens=True
    ),
    "further tokens": lambda folder: with_flags(byte_level(folder), special_tokens=("<x>", "ab")),
    "llama 2": metaspace,
    "separators only": lambda folder: separators_only(folder, sep_token="[SEP]", cls_token="[CLS]"),
    "ends only": lambda folder: separators_only(folder, eos_token="[SEP]", bos_token="[CLS]"),
    "no names": separators_only,
    "sentencepiece": lambda folder: sentencepiece_model(folder, "bpe"),
    "sentencepiece, legacy": lambda folder: with_flags(
        sentencepiece_model(folder, "unigram"),
        tokenizer_sentencepiece_legacy=True,
        special_tokens=("<s>", "<|a|>", "the", "<|a|>x"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_megatrons(tmp_path: Path, case: str) -> None:
    config = CASES[case](tmp_path / "tokenizer")
    ours, theirs = load_tokenizer(config), megatrons(config)
    texts = hard_texts(300) + ["the <s> the<|a|>x <|a|> x", "<s><s> a", "<x>ab <|a|>", "a b ab"]
    assert [ours.tokenize(text) for text in texts] == [theirs.tokenize(text) for text in texts]
    assert ours.vocab_size == theirs.vocab_size
    assert ours.ids() == token_ids(theirs)
    if "legacy" in case:
        ids = [ours.tokenize(text) for text in texts]
        assert [ours.detokenize(i).strip() for i in ids] == [theirs.detokenize(i) for i in ids]
        assert ours.eod is None
        with pytest.raises(AttributeError):
            theirs.eod  # noqa: B018
        return
    assert ours.eod == theirs.eod
    assert ours.detokenize(ours.tokenize("a b")) == theirs.detokenize(theirs.tokenize("a b"))


def test_further_tokens_of_sentencepiece_need_its_legacy_form(tmp_path: Path) -> None:
    config = with_flags(sentencepiece_model(tmp_path / "t", "bpe"), special_tokens=("<x>",))
    with pytest.raises(ValueError, match="cannot be loaded.*needs --tokenizer-sentencepiece-leg"):
        load_tokenizer(config)


def test_types_of_tokens_are_megatrons() -> None:
    assert indexed.HEADER == _INDEX_HEADER
    assert {d.__name__: i for i, d in enumerate(indexed.DTYPES, 1)} == {
        d.name: d.value for d in DType
    }
    for size in (1, 65_499, 65_500, 65_501, 10**6):
        assert indexed.token_dtype(size) is DType.optimal_dtype(size)


def save_as(folder: Path, kind: str) -> str:
    """A folder whose files name that class; what it makes of them is its own matter."""
    made = metaspace if kind == "LlamaTokenizer" else byte_level
    made(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": kind}))
    return str(folder)


def test_a_lean_start_loads_the_same_tokenizers_and_nothing_else(tmp_path: Path) -> None:
    folders = [save_as(tmp_path / kind, kind) for kind in CLASSES]
    said = {
        mode: subprocess.run(
            [sys.executable, "-c", LOAD, mode, *folders], cwd=ROOT, capture_output=True, text=True
        )
        for mode in ("--lean", "--plain")
    }
    lean, plain = (said[mode].stdout.splitlines() for mode in ("--lean", "--plain"))
    assert lean[:-1] == plain[:-1] and len(lean) == len(CLASSES) + 1, said
    assert (lean[-1], plain[-1]) == ("[]", '["torch"]')
    assert said["--lean"].stderr == ""


def test_the_tool_runs_without_torch_and_megatron(tmp_path: Path) -> None:
    byte_level(tmp_path / "tokenizer")
    (tmp_path / "in.jsonl").write_text('{"text": "some text"}\n')
    flags = [f"--input={tmp_path}/in.jsonl", f"--output-prefix={tmp_path}/out", "--append-eod"]
    flags += [f"--tokenizer-model={tmp_path}/tokenizer"]
    run = (
        "import runpy, sys; runpy.run_path(sys.argv[0], run_name='__main__');"
        "print([m for m in ('torch', 'megatron', 'awkward', 'pyarrow') if sys.modules.get(m)])"
    )
    command = f"import sys; sys.argv = {['tools/preprocess_data.py', *flags]}; {run}"
    result = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout.splitlines()[-1] == "[]", result


def test_added_tokens_keep_their_manners(tmp_path: Path) -> None:
    """Naming tokens must not lose what the folder says of them."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "<e>": 2}, []))
    tokenizer.add_special_tokens([AddedToken("<e>", lstrip=True, special=True)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>").save_pretrained(tmp_path)
    config = TokenizerConfig(tokenizer_model=str(tmp_path))
    ours, theirs = load_tokenizer(config), megatrons(config)
    assert ours.tokenize("a <e>b") == theirs.tokenize("a <e>b")
