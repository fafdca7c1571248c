"""Do both engines of preprocessing give the same tokens, for hard strings and many tokenizers?

    .venv/bin/python benchmarks/tokenizer_fuzz.py [--strings 100000] [--seed 0]

Each form of tokenizer gets so many strings: marks of all of Unicode in pairs and triples, spaces of
all kinds, digits, long runs, special tokens inside words, scripts, emoji, what is no character.
What `--engine auto` gives is compared with the tokenizer's own library. The forms that the fast
engine does not take say why. Real tokenizers come from pinned wheels. Results are kept in
`runs/fuzz`: a second call goes on with the forms that are left. Required: no string differs.
"""

import argparse
import itertools
import json
import random
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers  # noqa: E402
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from benchmarks.other_tokenizer import make_tokenizers  # noqa: E402
from megatron_let.data.cuts import GPT2, GPT4O, LLAMA3, OLMO3, QWEN2, QWEN35  # noqa: E402
from megatron_let.data.engines import Library, make_engine  # noqa: E402
from megatron_let.data.tokenizer import TokenizerConfig, load_tokenizer  # noqa: E402

REAL = ("cl100k", "deepseek", "smollm2", "tekken", "mistral-v1")
END = "<|endoftext|>"
# What the library counts otherwise than gigatoken: it must go to the library.
GPT4 = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
    r"\s++$|\s*[\r\n]|\s+(?!\S)|\s+"
)
DIGITS = r"\p{N}"
BATCH = 2_000
SPACES = [chr(c) for c in range(0x3100) if unicodedata.category(chr(c)) in ("Zs", "Zl", "Zp")]
SPACES += [
    "\t",
    "\n",
    "\r",
    "\r\n",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x85",
    "\u200b",
    "\ufeff",
    "  ",
    "\n\n",
]
MARKS = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)).startswith("M")]
LETTERS = [chr(c) for c in range(0x30000) if unicodedata.category(chr(c)).startswith("L")]
NUMBERS = [chr(c) for c in range(0x20000) if unicodedata.category(chr(c)).startswith("N")]
ODD = list("\x00\x01\x1f\x7f\ufffd\uffff\U0010ffff\ue000\u2060\u00ad\u202e")
EMOJI = [
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f1e9\U0001f1ea",
    "\U0001f44d\U0001f3fd",
]
SPECIALS = [END, "<s>", "</s>", "<|im_start|>", "<unk>", "<|endoftext", "\u2581", "<0x0A>", "[UNK]"]
WORDS = "the fox's don't I'LL we'Ve 1,234.5 e-9 snake_case camelCase x=[0]; // */ http://a.b/?c=d".split()


def strings(number: int, seed: int) -> Iterator[str]:
    """Hard strings, always the same of a seed."""
    dice = random.Random(seed)
    pools: list[tuple[list[str], int, int]] = [
        (WORDS, 1, 4), (SPACES, 1, 4), (MARKS, 1, 3), (LETTERS, 1, 4), (NUMBERS, 1, 5), (ODD, 1, 2),
        (EMOJI, 1, 2), (SPECIALS, 1, 2), (list("aA1 .'\n"), 1, 12), (list("0123456789"), 1, 30),
    ]  # fmt: skip
    yield from ("", " ", "\n", END, END * 2, " " * 5000, "a" * 5000, "\u0301" * 300, "1" * 3000)
    for _ in range(number - 9):
        parts = []
        for _ in range(dice.randint(1, 6)):
            pool, least, most = dice.choice(pools)
            parts += dice.choices(pool, k=dice.randint(least, most))
        if dice.random() < 0.02:
            parts.append(dice.choice(dice.choice(pools)[0]) * dice.randint(20, 400))
        yield "".join(parts)


# --- forms --------------------------------------------------------------------------------------


def byte_level(
    split: str | None = None, norm: Any = None, **options: Any
) -> Callable[[], Tokenizer]:
    """Byte-level BPE; `options` are the model's, and `prefix` and `cut` of the pre-tokenizer."""

    def make() -> Tokenizer:
        prefix, cut = options.pop("prefix", False), options.pop("cut", ("isolated", False))
        made = Tokenizer(models.BPE(**options))
        last = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=split is None)
        cuts = [pre_tokenizers.Split(Regex(part), *cut) for part in (split or "").split("\0")]
        made.pre_tokenizer = pre_tokenizers.Sequence([*cuts, last]) if split else last
        if norm is not None:
            made.normalizer = norm
        return trained(made, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())

    return make


def trained(made: Tokenizer, **options: Any) -> Tokenizer:
    """Learnt from some of the strings."""
    special = [END, "<s>", "</s>", "<unk>"]
    if not options:
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(vocab_size=2000, special_tokens=special, show_progress=False, **options)
    made.train_from_iterator(list(strings(3000, seed=99)), trainer)
    return made


def metaspace(like_gemma: bool = False, **options: Any) -> Callable[[], Tokenizer]:
    """SentencePiece's form of BPE, with a byte for what it does not know."""

    def make() -> Tokenizer:
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        if options:
            made.pre_tokenizer = pre_tokenizers.Metaspace(**options)
        elif like_gemma:
            made.normalizer = normalizers.Replace(" ", "\u2581")
            made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        else:
            parts = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
            made.normalizer = normalizers.Sequence(parts)
        return trained(made)

    return make


def added(**options: Any) -> Callable[[], Tokenizer]:
    """Byte-level BPE with a token added to it that is looked for in its own way."""

    def make() -> Tokenizer:
        made = byte_level()()
        made.add_tokens([AddedToken("fox", **options), AddedToken("<|im_start|>", **options)])
        return made

    return make


def unigram() -> Tokenizer:
    """SentencePiece's other form."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = UnigramTrainer(
        vocab_size=3000, special_tokens=["<unk>", END], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator([" ".join(WORDS)] * 50 + list(strings(500, seed=99)), trainer)
    return made


def word_piece() -> Tokenizer:
    """BERT's form."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = WordPieceTrainer(vocab_size=3000, special_tokens=["[UNK]", END], show_progress=False)
    made.train_from_iterator(list(strings(3000, seed=99)), trainer)
    return made


FORMS: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": byte_level(),
    "gpt-2, space in front": byte_level(prefix=True),
    "llama-3": byte_level(LLAMA3, ignore_merges=True),
    "qwen (NFC)": byte_level(QWEN2, normalizers.NFC()),
    "NFD": byte_level(norm=normalizers.NFD()),
    "NFKC": byte_level(norm=normalizers.NFKC()),
    "NFKD": byte_level(LLAMA3, normalizers.NFKD()),
    "NFD, then NFC": byte_level(norm=normalizers.Sequence([normalizers.NFD(), normalizers.NFC()])),
    "llama-3, removed": byte_level(LLAMA3, cut=("removed", True)),
    "gpt-2, as a split": byte_level(GPT2),
    "gpt-4": byte_level(GPT4),
    "olmo-3": byte_level(OLMO3),
    "qwen-3.5 (NFC)": byte_level(QWEN35, normalizers.NFC()),
    "gpt-4o": byte_level(GPT4O),
    "no pattern": byte_level(""),
    "digits alone": byte_level(DIGITS),
    "two splits": byte_level(f"{DIGITS}\0[\u4e00-\u9fa5\u3040-\u30ff]+"),
    "lower case": byte_level(norm=normalizers.Lowercase()),
    "stripped": byte_level(norm=normalizers.Strip()),
    "dropout": byte_level(dropout=0.1),
    "added, single word": added(single_word=True),
    "added, left space": added(lstrip=True),
    "added, right space": added(rstrip=True),
    "added, normalized": added(normalized=True),
    "llama-2": metaspace(),
    "metaspace, always": metaspace(prepend_scheme="always"),
    "metaspace, first": metaspace(prepend_scheme="first"),
    "metaspace, never": metaspace(prepend_scheme="never", split=False),
    "metaspace, never, split": metaspace(prepend_scheme="never", split=True),
    "metaspace, first, whole": metaspace(prepend_scheme="first", split=False),
    "gemma": metaspace(like_gemma=True),
    "unigram": unigram,
    "word piece": word_piece,
}


def load(name: str, folder: Path) -> Any:
    """A form's tokenizer, as preprocessing loads it."""
    place = ROOT / "runs" / "tokenizers" / name
    if name in FORMS:
        place = folder / "tokenizers" / name.replace(" ", "-")
        if not place.exists():
            made = PreTrainedTokenizerFast(tokenizer_object=FORMS[name](), eos_token=END)
            made.save_pretrained(place)
    return load_tokenizer(TokenizerConfig(tokenizer_model=str(place)))


# --- comparison ---------------------------------------------------------------------------------


def compared(name: str, folder: Path, number: int, seed: int) -> dict[str, Any]:
    """What came out of one form."""
    tokenizer = load(name, folder)
    told: list[str] = []
    engine, library = make_engine("auto", tokenizer, told.append), Library(tokenizer)
    found: dict[str, Any] = {"engine": engine.name, "why": told, "strings": 0, "differ": []}
    for batch in itertools.batched(strings(number, seed), BATCH):
        found["strings"] += len(batch)
        if engine.name == library.name:
            continue
        pairs = zip(batch, engine.encode(batch), library.encode(batch), strict=True)
        found["differ"] += [text for text, own, other in pairs if own.tolist() != other.tolist()]
    return found


def main() -> None:
    """Compare all forms, and print a row of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strings", type=int, default=100_000, help="a form (default 100000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forms", nargs="+", default=[*REAL, *FORMS], help="default: all")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "fuzz")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if set(REAL) & set(options.forms) and not (ROOT / "runs" / "tokenizers" / "done").exists():
        make_tokenizers(ROOT / "runs" / "tokenizers")
    print("| tokenizer | engine | strings | differ |\n|---|---|--:|--:|")
    total = 0
    for name in options.forms:
        kept = options.output / f"{name.replace(' ', '-')}-{options.strings}-{options.seed}.json"
        if not kept.exists():
            kept.write_text(
                json.dumps(compared(name, options.output, options.strings, options.seed))
            )
        found = json.loads(kept.read_text())
        engine = " ".join([found["engine"], *(f"({why})" for why in found["why"])])
        print(f"| {name} | {engine} | {found['strings']:,} | {len(found['differ'])} |", flush=True)
        for text in found["differ"][:3]:
            print(f"  {text!r}")
        total += len(found["differ"])
    print(f"\n{total} strings differ (required: 0).")
    sys.exit(total > 0)


if __name__ == "__main__":
    main()
