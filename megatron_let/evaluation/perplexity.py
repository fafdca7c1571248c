"""The loss of a model on held-out text: perplexity, and bits per byte, which tokenizers share.

Every token of every document is scored exactly once. A document longer than the context is read in
windows that overlap, so that a token behind the first window still has a past.
"""

import math
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import batched
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from megatron_let.data import documents as records
from megatron_let.data import sources
from megatron_let.errors import UsageError

WINDOWS_AT_ONCE = 512
"""Sorted by length before they are batched, so that little is padded."""


@dataclass(frozen=True)
class Document:
    """One text, and the part of the corpus it belongs to."""

    subset: str
    text: str


def read_documents(paths: Sequence[str], key: str, group: str | None) -> Iterator[Document]:
    """Texts under `key`, by the value of `group` in "meta"; UsageError for a record without."""
    for index, path in enumerate(paths):
        file = sources.InputFile(path, index, records.columns([key], group))
        for block in file.blocks(sources.Position(index)):
            found = records.parse(block, [key], group)
            if found.skipped:
                raise UsageError(str(found.skipped[0]))
            yield from map(Document, found.groups, found.texts[key])


@dataclass
class TextScore:
    """The loss on a part of the corpus."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    """Of the text in UTF-8."""
    loss: float = 0.0
    """Summed over the tokens, in nats."""

    @property
    def perplexity(self) -> float:
        """exp of the mean loss of a token; may be infinite, of a model that diverged."""
        mean = self.loss / self.tokens if self.tokens else math.nan
        return torch.tensor(mean, dtype=torch.double).exp().item()

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits over the bytes of the text."""
        return self.loss / math.log(2) / self.bytes if self.bytes else math.nan

    def __add__(self, other: "TextScore") -> "TextScore":
        return TextScore(*map(operator.add, astuple(self), astuple(other)))


@dataclass(frozen=True)
class Window:
    """A piece of a document that the model reads at once."""

    subset: str
    ids: list[int]
    """Its tokens and the one behind, which is only predicted."""
    scored: int
    """The last so many of its predictions count; the others did in the window before."""


def windows(subset: str, ids: list[int], context: int, stride: int) -> Iterator[Window]:
    """Cut a document so that every token but the first is predicted once.

    The model reads at most `context` tokens; the next window begins `stride` tokens further on, so
    that `context - stride` are read again.
    """
    start = end = 0
    while end < len(ids) - 1:
        stop = min(start + context, len(ids) - 1)
        yield Window(subset, ids[start : stop + 1], stop - end)
        start, end = start + stride, stop


def score_text(
    model: Any,
    tokenizer: Any,
    documents: Iterable[Document],
    *,
    context: int,
    stride: int,
    batch_size: int,
) -> dict[str, TextScore]:
    """Return the loss on each subset of one of transformers' causal language models.

    `context` and `stride` in tokens are those of `windows`, of which `batch_size` are read at once.
    """
    scores: dict[str, TextScore] = defaultdict(TextScore)

    def cut() -> Iterator[Window]:
        # Megatron's documents follow each other with the end token between them. Without such a
        # token a document's first one is not scored, and its bytes do not count.
        rows = model.get_input_embeddings().weight.shape[0]
        start = [tokenizer.eos_token_id, tokenizer.bos_token_id]
        first = [token for token in start if token is not None][:1]
        for document in documents:
            ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
            if (largest := max(first + ids, default=0)) >= rows:
                raise UsageError(
                    f"The tokenizer gives the id {largest} and the model has {rows} rows: put the "
                    "tokenizer of its training beside it."
                )
            found = list(windows(document.subset, first + ids, context, stride))
            tokens = sum(window.scored for window in found)
            given = "" if first else tokenizer.decode(ids[:1])
            size = len(document.text.encode()) - len(given.encode())
            scores[document.subset] += TextScore(1, tokens, size)
            yield from found

    for waiting in batched(cut(), WINDOWS_AT_ONCE):
        for batch in batched(sorted(waiting, key=lambda window: len(window.ids)), batch_size):
            for window, loss in zip(batch, _losses(model, batch), strict=True):
                if math.isnan(loss):
                    raise UsageError(
                        f"The loss is NaN: the model is damaged, or its {model.dtype} too small "
                        "for it, where --dtype float32 helps."
                    )
                scores[window.subset].loss += loss
    return dict(scores)


@torch.no_grad()
def _losses(model: Any, batch: Sequence[Window]) -> list[float]:
    """The summed loss of each window, in float32 by token and float64 in sum."""
    # Behind a window's end stands anything: no token sees what follows it.
    rows = [torch.tensor(window.ids) for window in batch]
    ids_BS = pad_sequence(rows, batch_first=True).to(model.device)
    logits_BSV = model(ids_BS[:, :-1]).logits
    losses = []
    for row, window in enumerate(batch):
        stop = len(window.ids) - 1
        counted = slice(stop - window.scored, stop)
        logits_SV, targets_S = logits_BSV[row, counted].float(), ids_BS[row, 1:][counted]
        losses_S = F.cross_entropy(logits_SV, targets_S, reduction="none")
        losses.append(losses_S.double().sum().item())
    return losses
