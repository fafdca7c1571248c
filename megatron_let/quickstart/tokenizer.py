"""Train the quickstart's tokenizer: byte-level BPE, as GPT-2's, on the corpus's training split."""

import hashlib
import json
from pathlib import Path

from megatron_let.conversion.output import complete_or_absent
from megatron_let.errors import UsageError

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(train_jsonl: Path, output_dir: Path, vocab_size: int) -> Path:
    """Train on the text in `train_jsonl`; returns `output_dir`.

    The vocabulary has `vocab_size` entries, `<|endoftext|>` (id 0) and every byte among them. A
    folder made from the same text and size is reused. Raises ValueError if it holds anything else,
    or the text is too small for the vocabulary.
    """
    with train_jsonl.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    digest = hashlib.sha256(b"".join(text.encode() + b"\0" for text in texts)).hexdigest()
    recipe = {"vocab_size": vocab_size, "text_sha256": digest}
    kept = output_dir / "recipe.json"
    if not output_dir.exists():
        with complete_or_absent(output_dir) as folder:
            _train_and_save(texts, vocab_size, folder)
            (folder / kept.name).write_text(json.dumps(recipe, indent=1) + "\n")
    elif not kept.is_file() or not recipe.items() <= json.loads(kept.read_text()).items():
        raise UsageError(
            f"{output_dir} exists and was not made from this text with {vocab_size} tokens: choose "
            "another folder, or delete it"
        )
    return output_dir


def _train_and_save(texts: list[str], vocab_size: int, folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # a set: order is random
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        found = f"the text gives only {tokenizer.get_vocab_size()} of {vocab_size} tokens"
        raise UsageError(f"{found}: ask for a smaller vocab_size, or give more text")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,  # it would change the text on decoding
    ).save_pretrained(folder)
