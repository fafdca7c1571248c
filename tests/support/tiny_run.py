"""A run that takes seconds: random words, two teachers that know them, and a student's flags.

What the tests train, those of `tests/chaos` too.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_let.checkpoint.folder import find_checkpoint
from megatron_let.checkpoint.reader import Checkpoint
from megatron_let.data.preprocess import PreprocessConfig, preprocess
from tests.support.testing import save_tiny_teacher

VOCAB, SEQ, BATCH, STEPS = 256, 16, 8, 8
FLAGS = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --ffn-hidden-size 64 --swiglu --normalization RMSNorm "
    "--disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights "
    f"--seq-length {SEQ} --max-position-embeddings {SEQ} --make-vocab-size-divisible-by 8 "
    f"--micro-batch-size 2 --global-batch-size {BATCH} --train-iters {STEPS} --lr 1e-2 "
    "--attention-dropout 0 --hidden-dropout 0 --eval-iters 1 --eval-interval 3 --log-interval 1 "
    "--save-interval 100 --num-workers 0 --cpu"
).split()
LET = "--method let --let-layer 2 --let-weight 1 --let-stop-step 4".split()


@dataclass(frozen=True)
class Corpus:
    """Random words, preprocessed, and two teachers that know the tokens."""

    folder: Path

    @property
    def flags(self) -> list[str]:
        """Megatron's data flags."""
        return [
            *("--data-path", f"{self.folder}/text_text_document", "--split", "80,20,0"),
            *("--data-cache-path", f"{self.folder}/cache"),
            *("--tokenizer-type", "HuggingFaceTokenizer"),
            *("--tokenizer-model", f"{self.folder}/tokenizer"),
        ]

    def let(self, *flags: str, teacher: str = "teacher") -> list[str]:
        """The flags of a guided run; later ones overrule."""
        return [*LET, "--teacher-model", f"{self.folder}/{teacher}", *flags]


def make_corpus(folder: Path) -> Corpus:
    """Write 200 documents of random words and the two teachers; runs in a worker too."""
    vocabulary = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0")
    for name, seed in (("teacher", 0), ("other", 1)):
        save_tiny_teacher(folder / name, vocab_size=VOCAB, seed=seed)
        fast.save_pretrained(folder / name)
    fast.save_pretrained(folder / "tokenizer")
    generator = torch.Generator().manual_seed(0)
    with (folder / "text.jsonl").open("w") as file:
        for length in torch.randint(5, 60, (200,), generator=generator).tolist():
            ids = torch.randint(1, VOCAB, (length,), generator=generator).tolist()
            file.write(json.dumps({"text": " ".join(f"w{i}" for i in ids)}) + "\n")
    preprocess(
        PreprocessConfig(
            input=(str(folder / "text.jsonl"),),
            output_prefix=str(folder / "text"),
            tokenizer_model=str(folder / "tokenizer"),
        )
    )
    return Corpus(folder)


def checkpoint(save: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint of a step, the latest if None."""
    return Checkpoint(find_checkpoint(save, step))


def hashes(save: Path, step: int | None = None) -> dict[str, str]:
    """SHA-256 of every tensor of a checkpoint, weights and optimizer state, by global name."""
    saved = checkpoint(save, step)
    return {name: _sha256(saved.read(name)) for name in tensor_names(saved)}


def tensor_names(saved: Checkpoint) -> set[str]:
    """The tensors of a checkpoint; what else it holds are objects, named by shards."""
    return {name for name in saved.names if "/shard_" not in name}


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
