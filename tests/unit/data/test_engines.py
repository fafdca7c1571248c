"""Both engines give the ids that Megatron's tokenizer gives one text at a time."""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import PreTrainedTokenizerFast

from megatron_let.data import cuts, engines
from megatron_let.data.encode import with_end
from megatron_let.data.engines import Gigatoken, Library, Rows, Unsuited, make_engine
from megatron_let.data.tokenizer import TokenizerConfig, load_tokenizer

EOD = "<|endoftext|>"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ALPHABETS = [
    "abcdefghij ABC",
    "   \t\n\r\u00a0\u2003\u3000\u200b\u0085\u2028",
    "0123456789.,-+%$",
    "'s't're'VE'Ll",
    "\u00e9e\u0301\u00df\u0130i\u0131\u01c5\ufb01",
    "\u4f60\u597d\u3053\u3093\uc548\ub155\u0627\u0644\u05e9\u05dc\u0e2a\u0e27\u0915\u094d\u0937",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f1e9\U0001f1ea\U0001f3fd\ufe0f",
    "\x00\x01\x1f\x7f\ufeff\ufffd\uffff\U0010ffff\ue000",
    '!"#$%&()*/:;<=>?@[]^_`{|}~',
]


def hard_texts(count: int, seed: int = 0) -> list[str]:
    """Runs of one alphabet after the other, with special tokens in between."""
    dice = random.Random(seed)
    specials = [EOD, "<s>", "<|endoftext", "</s>", "\u2581", "<0x0A>"]
    texts = ["", " ", "\n", "a", EOD, f"{EOD}{EOD}", " " * 1000, "a" * 3000, "ab" * 2000]
    while len(texts) < count:
        runs = []
        for _ in range(dice.randint(1, 12)):
            letters = dice.choice(ALPHABETS)
            runs.append("".join(dice.choices(letters, k=dice.randint(1, 12))))
            if dice.random() < 0.1:
                runs.append(dice.choice(specials))
        texts.append("".join(runs))
    return texts


def corpus() -> list[str]:
    source = Path(sys.modules["random"].__file__).read_text()
    return [*source.split("\n\n"), *hard_texts(400, seed=9)]


def save(folder: Path, tokenizer: Tokenizer, **names: Any) -> TokenizerConfig:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return TokenizerConfig(tokenizer_model=str(folder))


def byte_level(folder: Path, split: str | None = None, bos: bool = False) -> TokenizerConfig:
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    first = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, last])
    if split is None:
        tokenizer.pre_tokenizer = last
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=1500,
        special_tokens=[EOD, "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    if bos:
        around = [("<s>", 1), (EOD, 0)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"<s> $A {EOD}", special_tokens=around
        )
    return save(folder, tokenizer, eos_token=EOD, bos_token="<s>")


def metaspace(folder: Path) -> TokenizerConfig:
    """Llama 2's form: SentencePiece BPE with bytes for what it does not know."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = BpeTrainer(vocab_size=1500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    return save(folder, tokenizer, eos_token="</s>", bos_token="<s>")


def unigram(folder: Path) -> TokenizerConfig:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", EOD], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return save(folder, tokenizer, eos_token=EOD)


def sentencepiece_model(folder: Path, kind: str) -> TokenizerConfig:
    folder.mkdir()
    (folder / "text").write_text("\n".join(line for text in corpus() for line in text.split("\n")))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "model"),
        vocab_size=800,
        model_type=kind,
        byte_fallback=True,
        minloglevel=2,
    )
    return TokenizerConfig(
        tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(folder / "model.model")
    )


FAMILIES = {
    "gpt2": byte_level,
    "llama3": lambda folder: byte_level(folder, LLAMA3, bos=True),
    "llama2": metaspace,
    "unigram": unigram,
    "sentencepiece-bpe": lambda folder: sentencepiece_model(folder, "bpe"),
    "sentencepiece-unigram": lambda folder: sentencepiece_model(folder, "unigram"),
}
BEHIND_A_PROOF = {"gpt2", "llama3", "llama2"}
"""Those that gigatoken takes."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    config = FAMILIES[request.param](tmp_path_factory.mktemp("tokenizers") / request.param)
    return request.param, load_tokenizer(config)


def rows(arrays: Rows) -> list[list[int]]:
    return [row.tolist() for row in arrays]


def test_the_library_in_batches_is_megatron_one_by_one(family) -> None:
    _, tokenizer = family
    texts = hard_texts(1500)
    assert rows(Library(tokenizer).encode(texts)) == [tokenizer.tokenize(text) for text in texts]


def test_gigatoken_is_the_library(family) -> None:
    name, tokenizer = family
    if name not in BEHIND_A_PROOF:
        with pytest.raises(Unsuited, match="gigatoken does not take"):
            Gigatoken(tokenizer)
        return
    texts = hard_texts(6000, seed=1)
    ours, expected = (rows(made(tokenizer).encode(texts)) for made in (Gigatoken, Library))
    assert [t for t, one, other in zip(texts, ours, expected, strict=True) if one != other] == []


def test_texts_with_new_characters_go_to_the_library(tmp_path: Path) -> None:
    """U+A7CF is a letter since Unicode 17: gigatoken knows, the tokenizers library does not yet."""
    tokenizer = load_tokenizer(byte_level(tmp_path / "tokenizer"))
    engine, library = Gigatoken(tokenizer), Library(tokenizer)
    texts = ["plain", 'a "\ua7cf", b', "", "\ua7cfa\ua7cf", "Gr\u00fc\u00dfe"]
    admitted = [engine._screen.admit(text) for text in texts]
    assert admitted == ["plain", None, "", None, "Gr\u00fc\u00dfe"]
    assert rows(engine.encode(texts)) == rows(library.encode(texts))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama3"], indirect=True)
def test_no_other_character_is_cut_differently(family) -> None:
    """Every character in more contexts than a start looks at."""
    _, tokenizer = family
    engine, library = Gigatoken(tokenizer), Library(tokenizer)
    points = [chr(p) for p in range(0x80, 0x110000) if not 0xD800 <= p < 0xE000]
    texts = [
        "".join(f"a{c}a1{c}1 {c} {c}{c}\n{c}\n'{c}'s{c}\u0301{c}\t" for c in points[i : i + 32])
        for i in range(0, len(points), 32)
    ]
    assert rows(engine.encode(texts)) == rows(library.encode(texts))


def test_auto_says_why_it_falls_back(family) -> None:
    name, tokenizer = family
    said: list[str] = []
    engine = make_engine("auto", tokenizer, said.append)
    assert engine.name == ("gigatoken" if name in BEHIND_A_PROOF else "tokenizers")
    assert len(said) == (name not in BEHIND_A_PROOF)


def test_gigatoken_starts_anew_when_its_memory_has_grown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Gigatoken(load_tokenizer(byte_level(tmp_path / "tokenizer")))
    texts = hard_texts(50)
    before = rows(engine.encode(texts))
    first = engine._tokenizer
    monkeypatch.setattr(engines, "_CACHE_GROWTH_BYTES", -1)
    monkeypatch.setattr(engines, "_UNWATCHED_CHARACTERS", 0)
    assert rows(engine.encode(texts)) == before
    assert engine._tokenizer is not first


def test_without_gigatoken_auto_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    tokenizer = load_tokenizer(byte_level(tmp_path / "tokenizer"))
    said: list[str] = []
    assert make_engine("auto", tokenizer, said.append).name == "tokenizers"
    assert "pip install gigatoken" in said[0]
    with pytest.raises(Unsuited, match="pip install gigatoken"):
        make_engine("gigatoken", tokenizer, said.append)


def test_every_text_that_is_not_empty_gets_its_end() -> None:
    texts = [np.array(ids, np.uint32) for ids in ([], [1, 2], [], [3], [4], [])]
    ids, lengths = with_end(texts, 9, np.uint16)
    assert ids.tolist() == [1, 2, 9, 3, 9, 4, 9] and ids.dtype == np.uint16
    assert lengths.tolist() == [0, 3, 0, 2, 2, 0]
    ids, lengths = with_end(texts, None, np.int32)
    assert ids.tolist() == [1, 2, 3, 4] and ids.dtype == np.int32
    assert lengths.tolist() == [0, 2, 0, 1, 1, 0]
    assert [len(array) for array in with_end([], 9, np.uint16)] == [0, 0]


def test_ids_and_ends_of_every_family(family) -> None:
    name, tokenizer = family
    ids = tokenizer.ids()
    assert max(ids.values()) == tokenizer.vocab_size - 1
    end = {"llama2": "</s>"}.get(name, "</s>" if "piece" in name else EOD)
    assert ids[end] == tokenizer.eod


def cut(pattern: str, *ways: Any, space: bool = False, steps: Sequence[Any] = ()) -> Any:
    """A pre-tokenizer with one split."""
    last = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False)
    split = pre_tokenizers.Split(Regex(pattern), *(ways or ("isolated",)))
    return pre_tokenizers.Sequence([split, *steps, last])


UNPROVEN_CUTS = [
    None,
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    pre_tokenizers.Split(Regex(cuts.LLAMA3), "isolated"),
    cut(cuts.LLAMA3, "removed"),
    cut(cuts.LLAMA3, "contiguous"),
    cut(cuts.LLAMA3, space=True),
    cut(cuts.LLAMA3, steps=[pre_tokenizers.WhitespaceSplit()]),
    cut(cuts.LLAMA3.replace("{1,3}", "{1,3}+")),
]


@pytest.mark.parametrize(
    "form", [cut(cuts.QWEN35), cut(cuts.GPT4O), cut(cuts.GPT2, "removed", True)]
)
def test_proven_cuts_are_gigatokens(tmp_path, form) -> None:
    made = load_tokenizer(byte_level(tmp_path / "first")).fast
    made.pre_tokenizer = form
    tokenizer = load_tokenizer(save(tmp_path / "second", made, eos_token=EOD))
    texts = hard_texts(1000, seed=2)
    assert rows(Gigatoken(tokenizer).encode(texts)) == rows(Library(tokenizer).encode(texts))


@pytest.mark.parametrize("name", ["continuing_subword_prefix", "end_of_word_suffix"])
def test_marks_of_words_are_the_librarys(tmp_path, name) -> None:
    source = json.loads(load_tokenizer(byte_level(tmp_path / "tokenizer")).fast.to_str())
    engines._check_features(source)
    source["model"][name] = "##"
    with pytest.raises(Unsuited, match=f"with a model's {name}"):
        engines._check_features(source)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda made: setattr(made.model, "dropout", 0.1), "with a model's dropout"),
        *(
            (lambda made, form=form: setattr(made, "pre_tokenizer", form), "proven to cut texts")
            for form in UNPROVEN_CUTS
        ),
        (
            lambda made: made.add_tokens([AddedToken("random", single_word=True)]),
            "finds the added token 'random' inside words",
        ),
        (lambda made: {"split_special_tokens": True}, "with split_special_tokens"),
    ],
)
def test_what_gigatoken_does_not_do_goes_to_the_library(tmp_path, change, why) -> None:
    made = load_tokenizer(byte_level(tmp_path / "first")).fast
    changed = change(made)
    options = changed if isinstance(changed, dict) else {}
    tokenizer = load_tokenizer(save(tmp_path / "second", made, eos_token=EOD, **options))
    told: list[str] = []
    assert make_engine("auto", tokenizer, told.append).name == "tokenizers"
    assert why in told[0]
    with pytest.raises(Unsuited, match=why):
        make_engine("gigatoken", tokenizer, print)
