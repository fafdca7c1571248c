"""No byte differs for what a normalizer does to several characters, whatever Unicode they are from.

The tokenizers here have the 256 bytes for a vocabulary: their ids are the bytes of the normalized
text. All tables of Unicode are at work: Python's, the tokenizers library's and gigatoken's.
"""

import itertools
import random
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import gigatoken
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_let.data import characters
from megatron_let.data.engines import Gigatoken, Library, Unsuited
from megatron_let.data.tokenizer import TokenizerConfig, load_tokenizer

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NORMALIZERS = {
    "NFC": normalizers.NFC(),
    "NFD": normalizers.NFD(),
    "NFKC": normalizers.NFKC(),
    "NFKD": normalizers.NFKD(),
    "NFD, NFC": normalizers.Sequence([normalizers.NFD(), normalizers.NFC()]),
    "NFKC, NFD": normalizers.Sequence([normalizers.NFKC(), normalizers.NFD()]),
}
FROM_THE_FIELD = ["\u0c15\u0c4d\u0c3c", "\u0995\u09cd\u09fe", "a\u1ac8\u0330", "x a\u1df8\u0323"]
EOD = "<|endoftext|>"
EVERY_CHARACTER = [
    chr(point)
    for point in (*range(0x80, 0x40000), *range(0xE0000, 0xE1000))
    if not 0xD800 <= point < 0xE000
]
LOWEST, HIGHEST = "\u0334", "\u0345"  # the first and the last class of marks in order


def byte_tokenizer(normalizer: object) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    split = pre_tokenizers.Split(Regex(QWEN2), "isolated")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, last])
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def both(folder: Path, tokenizer: Tokenizer) -> tuple[Gigatoken, Library]:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOD).save_pretrained(folder)
    loaded = load_tokenizer(TokenizerConfig(tokenizer_model=str(folder)))
    return Gigatoken(loaded), Library(loaded)


@pytest.fixture(scope="module", params=NORMALIZERS)
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return both(folder, byte_tokenizer(NORMALIZERS[request.param]))


@pytest.fixture(scope="module")
def nfc(tmp_path_factory: pytest.TempPathFactory) -> tuple[Gigatoken, Library]:
    return both(tmp_path_factory.mktemp("nfc"), byte_tokenizer(NORMALIZERS["NFC"]))


@pytest.fixture(scope="module")
def marks() -> list[str]:
    """All that Python calls one, and all that gigatoken orders: its tables are newer."""
    texts = [f"a{HIGHEST}{mark}\n{mark}{LOWEST}" for mark in EVERY_CHARACTER]
    with_nfc, without = (
        gigatoken.Tokenizer.from_json(byte_tokenizer(normalizer).to_str()).encode_batch_list(texts)
        for normalizer in (normalizers.NFC(), None)
    )
    bytes_of_each = zip(EVERY_CHARACTER, with_nfc, without, strict=True)
    ordered = {c for c, one, other in bytes_of_each if one != other and len(one) == len(other)}
    known = {c for c in EVERY_CHARACTER if unicodedata.category(c)[0] == "M"}
    assert len(ordered) > 900 and len(known) > 2000
    return sorted(ordered | known)


@cache
def of_each_class() -> list[str]:
    """A mark of each class, in the classes' order."""
    by_class = {unicodedata.combining(c): c for c in reversed(EVERY_CHARACTER)}
    return [by_class[number] for number in sorted(by_class) if number]


@cache
def composites() -> list[str]:
    """Characters that are made of others, without Hangul's syllables."""
    found = [c for c in EVERY_CHARACTER if unicodedata.normalize("NFD", c) != c]
    return [c for c in found if not 0xAC00 <= ord(c) < 0xD7A4]


def hangul() -> Iterator[str]:
    """Letters, syllables and finals, whole and half, at both ends of their ranges and beyond."""
    leads, vowels = "\u1100\u1112\u1113", "\u1160\u1161\u1175\u1176"
    finals, syllables = "\u11a7\u11a8\u11c2\u11c3", "\uac00\uac01\ud7a3\ud788"
    for length in (2, 3):
        yield from map(
            "".join, itertools.product(leads + vowels + finals + syllables, repeat=length)
        )


def runs(pool: list[str], count: int) -> list[str]:
    dice = random.Random(0)
    return ["".join(dice.choices(pool, k=dice.randint(3, 9))) for _ in range(count)]


def differing(engines: tuple[Gigatoken, Library], texts: Iterable[str]) -> list[str]:
    """Those of the texts whose tokens differ."""
    found = []
    for part in itertools.batched(texts, 100_000):
        rows = zip(part, *(engine.encode(part) for engine in engines), strict=True)
        found += [ascii(t) for t, one, other in rows if one.tolist() != other.tolist()]
    return found


def test_marks_in_a_row_from_the_field(nfc) -> None:
    assert differing(nfc, FROM_THE_FIELD) == []
    assert [nfc[0]._screen.admit(text) for text in FROM_THE_FIELD] == FROM_THE_FIELD


def test_every_mark_beside_every_class_of_marks(nfc, marks) -> None:
    pairs = ((mark, other) for mark in marks for other in of_each_class()[::3])
    texts = (f"a{one}{other}{one}" for one, other in pairs)
    assert differing(nfc, texts) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)  # nine million pairs
def test_every_mark_behind_every_mark(nfc, marks) -> None:
    assert differing(nfc, (f"a{one}{other}" for one in marks for other in marks)) == []


def test_what_is_made_of_others_before_and_behind_marks(nfc) -> None:
    classes = of_each_class()
    texts = (f"{mark}{c}{mark} {c}{c}" for c in composites() for mark in classes[::6])
    assert differing(nfc, texts) == []
    parts = (unicodedata.normalize("NFD", c) for c in composites())
    assert differing(nfc, (f"{p} {p[0]}{m}{p[1:]}" for p in parts for m in classes[::6])) == []


def test_hangul(nfc) -> None:
    assert differing(nfc, hangul()) == []


def test_runs_of_marks_letters_and_others(engines, marks) -> None:
    """More than two in a row, for every normalizer."""
    pool = [*marks, *composites(), *"\u1100\u1161\u11a8\uac00\uac01 aA1\n'<|>"]
    assert differing(engines, runs(pool, 5_000)) == []
    old = [*of_each_class(), *"aeiou\u0915\u0995\u0c15\u05d0\u0627"]
    assert differing(engines, runs(old, 5_000)) == []


def test_added_tokens_among_marks(tmp_path: Path) -> None:
    """A mark behind "<|endoftext|>" must not join its last letter, one inside makes it a text."""
    tokenizer = byte_tokenizer(NORMALIZERS["NFC"])
    tokenizer.add_tokens([AddedToken("caf\u00e9", normalized=True)])
    engines = both(tmp_path / "tokenizer", tokenizer)
    pool = [EOD, "\u0338", "\u0301", "cafe", "caf\u00e9", "caf", "e", ">", "|", "\u212b", "\u1ac8"]
    texts = runs(pool, 5_000)
    assert differing(engines, texts) == []
    assert sum(engines[0]._screen.admit(text) is None for text in texts) < len(texts)


def test_the_checks_see_a_screen_with_holes(nfc, marks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their twin: with the marks or the joining letters taken for inactive they fail."""
    fresh = gigatoken.Tokenizer.from_json(byte_tokenizer(None).to_str())
    pieces = (lambda texts: fresh.encode_batch_list(texts, parallel=False),) * 2
    for holes in ("_is_active", "_joined"):
        screen = characters.Screen(*pieces, normalizers.NFC(), [])
        if holes == "_is_active":
            monkeypatch.setattr(screen, "_is_active", lambda character: False)
        else:
            monkeypatch.setattr(screen, "_joined", set())
        monkeypatch.setattr(nfc[0], "_screen", screen)
        assert differing(nfc, [*(f"a{HIGHEST}{mark}" for mark in marks), *hangul()])


def test_a_normalizer_that_was_not_proven_is_left_to_the_library(tmp_path: Path) -> None:
    for number, normalizer in enumerate(
        [
            normalizers.Lowercase(),
            normalizers.StripAccents(),
            normalizers.Sequence([normalizers.NFC(), normalizers.Strip()]),
        ]
    ):
        with pytest.raises(Unsuited, match="is not used with the normalizer"):
            both(tmp_path / str(number), byte_tokenizer(normalizer))


def test_an_added_token_that_is_not_normalized_is_left_to_the_library(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(NORMALIZERS["NFC"])
    tokenizer.add_tokens([AddedToken("cafe\u0301", normalized=True)])
    with pytest.raises(Unsuited, match="is not normalized"):
        both(tmp_path / "tokenizer", tokenizer)
