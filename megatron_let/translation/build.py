"""The translator of a run: its student's tokenizer by Megatron's flags, and the teacher's."""

import hashlib
import os
from argparse import Namespace
from dataclasses import fields
from pathlib import Path

from transformers import AutoTokenizer

from megatron_let import hugging_face
from megatron_let.data.tokenizer import HuggingFace, TokenizerConfig, load_tokenizer
from megatron_let.errors import UsageError
from megatron_let.translation.rows import Translator
from megatron_let.translation.token_bytes import TokenBytes


def build_translator(args: Namespace, source: str | Path, revision: str | None) -> Translator:
    """Return what brings the student's rows to a teacher in the folder or hub id `source`.

    Raises:
        UsageError: a tokenizer cannot be loaded, or has no end token, or does not keep bytes.
    """
    # With threads of its own a tokenizer hangs in a worker that is forked later.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    names = [field.name for field in fields(TokenizerConfig)]
    config = TokenizerConfig(**{name: getattr(args, name) for name in names})
    try:
        student = load_tokenizer(config)
    except ValueError as error:
        raise UsageError(f"With a teacher of another tokenizer: {error}.") from error
    flag = f"--teacher-model {source}"
    found = hugging_face.load(
        AutoTokenizer, source, f"The tokenizer of {flag} cannot be loaded.", revision=revision
    )
    if not found.is_fast:
        raise UsageError(
            f"{flag} has no tokenizer.json, without which its tokenizer is too slow to read the "
            "student's text again: save it in its fast form."
        )
    own = f"--tokenizer-model {args.tokenizer_model or args.vocab_file}"
    return Translator(TokenBytes(student, own), TokenBytes(HuggingFace(found, (), True), flag))


def fingerprint(translator: Translator) -> str:
    """Eight hexadecimal digits that change with anything the teacher's tokenizer does."""
    text = translator.teacher.tokenizer.fast.to_str()
    ends = f"{translator.start} {translator.end}"
    return hashlib.sha256((text + ends).encode()).hexdigest()[:8]
