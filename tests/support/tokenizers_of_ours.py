"""Small tokenizers of the forms that people have, trained on the spot."""

import json
from pathlib import Path

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
UNICODE = (
    "na\u00efve caf\u00e9s \u2014 \u201cquoted\u201d\u2026 \u041f\u0440\u0438\u0432\u0435\u0442 "
    "\u4e16\u754c \u0639\u0631\u0628\u064a\u0629 \U0001f30d\n\n\tindented  twice   1,234.5\r\n"
)
END, START = "<|end|>", "<|start|>"


def texts() -> list[str]:
    """What they are trained on."""
    pages = [ROOT / "README.md", ROOT / "docs" / "methods.md", ROOT / "docs" / "extending.md"]
    return [*(page.read_text() for page in pages), UNICODE * 3]


def byte_level(size: int, digits: bool = False) -> Tokenizer:
    """As GPT-2's; `digits` are single, as Llama 3's and SmolLM's."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cuts = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def sentencepiece(size: int, metaspace: bool = False) -> Tokenizer:
    """As Llama 2's: a space in front of each text, rare characters as bytes, a start token.

    With `metaspace` as Mistral's later ones: none in front of a space.
    """
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 256,
        special_tokens=["<unk>", START, END],
        limit_alphabet=70,
        show_progress=False,
    )
    learnt.train_from_iterator(texts(), trainer)
    source = json.loads(learnt.to_str())
    vocabulary, merges = source["model"]["vocab"], source["model"]["merges"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    model = models.BPE(
        vocabulary, [tuple(m) for m in merges], byte_fallback=True, fuse_unk=True, unk_token="<unk>"
    )
    tokenizer = Tokenizer(model)
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        replace = normalizers.Replace(" ", "\u2581")
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", START, END])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, vocabulary[START])]
    )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> Path:
    """As a Hugging Face folder's."""
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    wrapped.save_pretrained(folder)
    return folder
