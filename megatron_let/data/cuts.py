"""The pre-tokenizers that gigatoken was proven to follow.

gigatoken looks for a form or a pattern that it knows and ignores what stands around it: other
options, further steps, nothing at all. `benchmarks/tokenizer_fuzz.py` proves each form of these.
"""

from typing import Any

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS, _OTHERS = r"[^\r\n\p{L}\p{N}]?", r" ?[^\s\p{L}\p{N}]+"
_LINES, _SPACES = r"\s*[\r\n]+", r"|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words(digits: str, ending: str = "") -> str:
    """Upper case begins a word."""
    first, second = f"{_UPPER}*{_LOWER}+{ending}", f"{_UPPER}+{_LOWER}*{ending}"
    words = f"{_LETTERS}{first}|{_LETTERS}{second}"
    return rf"{words}|{digits}|{_OTHERS}[\r\n/]*|{_LINES}{_SPACES}"


GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+|" + _OTHERS + _SPACES
LLAMA3 = rf"{_ENGLISH}|{_LETTERS}\p{{L}}+|\p{{N}}{{1,3}}|{_OTHERS}[\r\n]*|{_LINES}{_SPACES}"
QWEN2 = LLAMA3.replace("{1,3}", "")
QWEN35 = QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"\s\p{L}", r"\s\p{L}\p{M}")
OLMO3 = LLAMA3.replace(_LINES, r"\s*[\r\n]")
GPT4O = _words(r"\p{N}{1,3}", f"{_ENGLISH}?")
TEKKEN = _words(r"\p{N}")
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+" + _SPACES,
)
# Not GPT-4's own: the library reads its possessive counts ("{1,3}+") as repeated ones.
_PATTERNS = [(one,) for one in (GPT2, LLAMA3, QWEN2, QWEN35, OLMO3, GPT4O, TEKKEN)] + [DEEPSEEK3]
_SPACE, _MARK = {"String": " "}, "\u2581"
_GEMMA = (
    {"type": "Replace", "pattern": _SPACE, "content": _MARK},
    {"type": "Split", "pattern": _SPACE, "behavior": "MergedWithPrevious", "invert": False},
)


def is_proven(source: dict[str, Any]) -> bool:
    """Whether the pre-tokenizer of a tokenizer.json is one of these."""
    form = source["pre_tokenizer"]
    if source["model"].get("byte_fallback"):  # SentencePiece's kind
        kind = None if form is None else form["type"]
        return kind in (None, "Metaspace") or (source["normalizer"], form) == _GEMMA
    *splits, last = (form or {}).get("pretokenizers", [form]) or [None]
    if last is None or last["type"] != "ByteLevel" or last["use_regex"] == bool(splits):
        return False
    if not splits:
        return form is last
    ways = {(split.get("behavior"), split.get("invert")) for split in splits}
    # To remove what no pattern matches removes nothing, and a second split has nothing to find.
    are_whole = ways == {("Isolated", False)} or (ways == {("Removed", True)} and len(splits) == 1)
    patterns = tuple(split.get("pattern", {}).get("Regex") for split in splits)
    return not last["add_prefix_space"] and are_whole and patterns in _PATTERNS
