"""Where do two real tokenizers meet, and how fast does a worker find out?

    .venv/bin/python benchmarks/other_tokenizer.py [--rows 100] [--edits 300]

Of each pair, on rows of 2,048 of the student's tokens: the share of tokens that end where one of
the teacher's does and are guided, in English (READMEs) and in Python; the teacher's tokens for each
of the student's; the share of random edits of the text that change which tokens before them are
guided; and the tokens a second that one worker delivers (seconds of its own, warm, English). No
edit may move a target: that is counted, and must be 0. The tokenizers come from pinned wheels.
"""

import argparse
import json
import random
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: E402
from transformers.convert_slow_tokenizer import TikTokenConverter  # noqa: E402

from examples.study.study import DOCUMENTATION  # noqa: E402
from megatron_let.data.tokenizer import TokenizerConfig  # noqa: E402
from megatron_let.quickstart.wheels import TEXT, fetch_wheels  # noqa: E402
from megatron_let.translation.rows import NOTHING, Translator  # noqa: E402
from megatron_let.translation.run import build_translator  # noqa: E402

WHEELS = Path(__file__).with_name("tokenizers.txt")
FILES = (".json", ".v1", ".gguf", "9b5ad71b2ce5302211f9c61530b329a4922fc6a4")
LENGTH = 2048
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
PAIRS = (
    "cl100k tekken, tekken cl100k, deepseek tekken, tekken deepseek, cl100k smollm2, "
    "tekken smollm2, smollm2 cl100k, cl100k mistral-v1, mistral-v1 cl100k, mistral-v1 smollm2"
)
"""Student and teacher."""
HEAD = (
    "| student | teacher | guided, English | guided, Python | teacher's tokens for each "
    "| edits that move who is guided | tokens/s of a worker |\n|---|---|--:|--:|--:|--:|--:|"
)


def make_tokenizers(folder: Path) -> None:
    """Write a Hugging Face folder for each tokenizer that the wheels hold."""
    found = {p.name: p for root in fetch_wheels(WHEELS, endings=FILES) for p in root.rglob("*.*")}
    found |= {p.name: p for p in TEXT.glob(f"tokenizers/**/{FILES[-1]}")}
    from_tiktoken(found[FILES[-1]], CL100K, folder / "cl100k")
    tekken = json.loads(found["tekken_240911.json"].read_bytes())
    config, ranks = tekken["config"], folder / "tekken.tiktoken"
    number = config["default_vocab_size"] - config["default_num_special_tokens"]
    words = tekken["vocab"][:number]
    ranks.write_text("".join(f"{w['token_bytes']} {w['rank']}\n" for w in words))
    from_tiktoken(ranks, config["pattern"], folder / "tekken")
    for name, path, options in (
        ("deepseek", found["tokenizer.json"].parent, {}),
        ("smollm2", next(p.parent for n, p in found.items() if n.endswith(".gguf")), {}),
        ("mistral-v1", sentencepiece(found["tokenizer.model.v1"], folder / "model"), {}),
    ):
        gguf = [p.name for p in path.glob("*.gguf")]
        options = {"gguf_file": gguf[0]} if gguf else {}
        AutoTokenizer.from_pretrained(path, **options).save_pretrained(folder / name)


def from_tiktoken(ranks: Path, pattern: str, folder: Path) -> None:
    """Write a tokenizer of tiktoken's form as a Hugging Face folder."""
    end = "<|endoftext|>"
    made = TikTokenConverter(
        vocab_file=str(ranks), pattern=pattern, extra_special_tokens=[end]
    ).converted()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end).save_pretrained(folder)


def sentencepiece(model: Path, folder: Path) -> Path:
    """Put a model beside the configuration of Llama 2's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def texts(wheels: Path | None, ending: str, characters: int) -> list[str]:
    """Some text of the study's wheels."""
    roots = fetch_wheels() if wheels is None else fetch_wheels(wheels)
    files = sorted(path for root in roots for path in root.rglob(f"*{ending}"))
    random.Random(0).shuffle(files)
    found: list[str] = []
    for path in files:
        found.append(path.read_text(encoding="utf-8", errors="ignore"))
        if sum(map(len, found)) > characters:
            break
    return found


def rows(translator: Translator, documents: Sequence[str], number: int) -> list[np.ndarray]:
    """Packed rows of the student's tokens."""
    student = translator.student
    ids = [i for text in documents for i in [*student.encode(text), student.tokenizer.eod]]
    packed = [np.array(ids[i : i + LENGTH]) for i in range(0, len(ids) - LENGTH, LENGTH)]
    return packed[:number]


def share(translator: Translator, packed: Sequence[np.ndarray]) -> tuple[float, float]:
    """Guided tokens, and tokens of the teacher's, for each of the student's."""
    found = [translator.row(row) for row in packed]
    guided = float(np.mean([(index != NOTHING).mean() for _, index in found]))
    return guided, sum(len(ids) for ids, _ in found) / (LENGTH * len(packed))


def speed(translator: Translator, packed: Sequence[np.ndarray]) -> float:
    """Tokens a second of this process's own time, with what half of the rows have taught it."""
    half = len(packed) // 2
    for row in packed[:half]:
        translator.row(row)
    start = time.process_time()
    for row in packed[half:]:
        translator.row(row)
    return LENGTH * (len(packed) - half) / (time.process_time() - start)


def edited(translator: Translator, documents: Sequence[str], edits: int) -> tuple[float, int]:
    """Share of edits that move who is guided, and targets that moved, before the edit."""
    dice, moved, told = random.Random(0), 0, 0
    text = "\n".join(documents)
    for _ in range(edits):
        start, place = dice.randrange(len(text) - 400), dice.randrange(100, 300)
        one = text[start : start + 400]
        other = one[:place] + chr(dice.randrange(32, 127)) + one[place + dice.randrange(2) :]
        ids = [np.array(translator.student.encode(t)) for t in (one, other)]
        same = next((i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), 0)
        (row_a, at_a), (row_b, at_b) = map(translator.row, ids)
        has_a, has_b = at_a[:same] != NOTHING, at_b[:same] != NOTHING
        moved += bool((has_a != has_b).any())
        for i in np.flatnonzero(has_a & has_b):
            told += row_a[: at_a[i] + 1].tolist() != row_b[: at_b[i] + 1].tolist()
    return moved / edits, told


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--edits", type=int, default=300)
    options = parser.parse_args()
    folder = ROOT / "runs" / "tokenizers"
    if not (folder / "done").exists():
        make_tokenizers(folder)
        (folder / "done").touch()
    characters = options.rows * LENGTH * 6
    english = texts(DOCUMENTATION, "README.md", characters)
    python = texts(None, ".py", characters)
    print(HEAD)
    for pair in PAIRS.split(", "):
        student, teacher = pair.split()
        config = vars(TokenizerConfig(tokenizer_model=f"{folder}/{student}"))
        translator = build_translator(Namespace(**config), folder / teacher, None)
        packed = rows(translator, english, options.rows)
        (guided, tokens), code = share(translator, packed), rows(translator, python, options.rows)
        moved, told = edited(translator, english, options.edits)
        assert not told, f"{pair}: {told} targets moved"
        print(
            f"| {student} | {teacher} | {guided:.3f} | {share(translator, code)[0]:.3f} | "
            f"{tokens:.2f} | {100 * moved:.0f} % | {speed(translator, packed):,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
