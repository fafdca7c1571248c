"""Whole runs for tests: `train` on the worker's side, data and what a run left on the test's.

A test never imports Megatron; it reads metrics and checkpoints, which is what a user is left with.
"""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_let.conversion.checkpoint import Checkpoint, find_checkpoint
from megatron_let.data.preprocess import PreprocessConfig, preprocess
from megatron_let.errors import UsageError
from megatron_let.testing import forget_last_run, run_distributed, save_tiny_teacher

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
TP2_PP2 = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2".split()


# --- in a worker -------------------------------------------------------------------------------


def train(argv: list[str]) -> str | None:
    """Run `pretrain_let.py` on this rank; return the text of its usage error, if it has one."""
    import pretrain_let

    forget_last_run()
    sys.argv = ["pretrain_let.py", *argv]
    try:
        pretrain_let.main()
    except UsageError as error:
        return str(error)
    except SystemExit as end:  # --exit-interval
        assert not end.code, end.code
    return None


def select_samples(argv: list[str]) -> None:
    """Run `tools/select_data.py` on this rank."""
    from tools import select_data

    forget_last_run()
    select_data.main(argv)


def select_samples_interrupted(argv: list[str]) -> tuple[int, int]:
    """The same, killed before it puts its parts together, and again; batches scored each time."""
    from megatron_let.data import select

    scored, score = [0, 0], select.Scorer.score
    attempt = 0

    def counting(self: select.Scorer, samples: list[dict]) -> object:
        scored[attempt] += 1
        return score(self, samples)

    def dying(parts: list[Path]) -> object:
        raise KeyboardInterrupt

    joined = select._joined
    select.Scorer.score, select._joined = counting, dying
    try:
        select_samples(argv)
    except KeyboardInterrupt:
        attempt = 1
    finally:
        select._joined = joined
    try:
        select_samples(argv)
    finally:
        select.Scorer.score = score
    return scored[0], scored[1]


def train_until_sigterm(argv: list[str], metrics: Path) -> str | None:
    """As `train`, ended by a signal, as by a scheduler, once three steps are logged."""
    threading.Thread(target=_sigterm_after_three_steps, args=(metrics,), daemon=True).start()
    return train([*argv, "--exit-signal-handler"])


def _sigterm_after_three_steps(metrics: Path) -> None:
    while not metrics.exists() or metrics.read_text().count('"kind": "train"') < 3:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)


# --- in a test ---------------------------------------------------------------------------------


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


def run(world_size: int, *argv: str) -> str | None:
    """Run `pretrain_let.py` with the common flags in the pool; return its usage error, if any."""
    errors = run_distributed("tests.distributed.training:train", world_size, [*FLAGS, *argv])
    assert len(set(errors)) == 1, errors  # every rank stops, or none
    return errors[0]


def records(save: Path, kind: str) -> dict[int, dict[str, float]]:
    """What a run logged, by iteration; `kind` is `train`, `valid` or `start`."""
    lines = (save / "metrics.jsonl").read_text().splitlines()
    return {r["iteration"]: r for r in map(json.loads, lines) if r["kind"] == kind}


def series(save: Path, key: str) -> dict[int, float]:
    """One logged training quantity by iteration."""
    return {i: record[key] for i, record in records(save, "train").items() if key in record}


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


def only_weights(names: Iterable[str]) -> set[str]:
    """The names that are no optimizer state."""
    return {name for name in names if not name.startswith("optimizer.")}


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
