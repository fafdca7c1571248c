"""The loss of a model on held-out text: perplexity, and bits per byte, which tokenizers share.

Every token of every document is scored exactly once. A document longer than the context is read in
windows that overlap, so that a token behind the first window still has a past.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

WINDOWS_AT_ONCE = 512
"""Sorted by length before they are batched, so that little is padded."""


@dataclass(frozen=True)
class Document:
    """One text, and the part of the corpus it belongs to."""

    subset: str
    text: str


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
        """exp of the mean loss of a token."""
        return math.exp(self.loss / self.tokens) if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits over the bytes of the text."""
        return self.loss / math.log(2) / self.bytes if self.bytes else math.nan

    def __add__(self, other: "TextScore") -> "TextScore":
        return TextScore(
            self.documents + other.documents,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.loss + other.loss,
        )


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

    Args:
        subset: to whose loss it counts.
        ids: the document's tokens, the one that starts it first.
        context: most tokens that the model reads.
        stride: how far the next window begins behind; `context - stride` tokens are read again.
    """
    end = 0
    for start in range(0, max(len(ids) - 1, 0), stride):
        if end >= len(ids) - 1:
            return
        stop = min(start + context, len(ids) - 1)
        yield Window(subset, ids[start : stop + 1], stop - end)
        end = stop


class TextScorer:
    """Scores documents with one model.

    Args:
        model: transformers' causal language model, in evaluation mode.
        tokenizer: its tokenizer.
        context: most tokens at once.
        stride: between the starts of two windows.
        batch_size: windows at once.
    """

    def __init__(
        self, model: Any, tokenizer: Any, context: int, stride: int, batch_size: int
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.context, self.stride = context, stride
        self._batch_size = batch_size
        # Megatron's documents follow each other with the end token between them.
        start = tokenizer.eos_token_id
        # Without such a token a document's first one is not scored.
        self._start = tokenizer.bos_token_id if start is None else start

    def score(self, documents: Iterable[Document]) -> dict[str, TextScore]:
        """Return the loss on each subset."""
        scores: dict[str, TextScore] = defaultdict(TextScore)
        waiting: list[Window] = []
        for document in documents:
            ids = self._tokenizer(document.text, add_special_tokens=False, verbose=False)
            ids = [self._start] * (self._start is not None) + ids["input_ids"]
            cut = list(windows(document.subset, ids, self.context, self.stride))
            tokens = sum(window.scored for window in cut)
            size = len(document.text.encode())
            scores[document.subset] += TextScore(1, tokens, size)
            waiting += cut
            if len(waiting) >= WINDOWS_AT_ONCE:
                self._score_windows(waiting, scores)
                waiting = []
        self._score_windows(waiting, scores)
        return dict(scores)

    def _score_windows(self, found: list[Window], scores: dict[str, TextScore]) -> None:
        found = sorted(found, key=lambda window: len(window.ids))
        for first in range(0, len(found), self._batch_size):
            batch = found[first : first + self._batch_size]
            for window, loss in zip(batch, self._losses(batch), strict=True):
                scores[window.subset].loss += loss

    @torch.no_grad()
    def _losses(self, batch: list[Window]) -> list[float]:
        """The summed loss of each window, in float32 by token and float64 in sum."""
        longest = max(len(window.ids) for window in batch)
        # Behind a window's end stands anything: no token sees what follows it.
        rows = [window.ids + [0] * (longest - len(window.ids)) for window in batch]
        ids_BS = torch.tensor(rows, device=self._model.device)
        logits_BSV = self._model(ids_BS[:, :-1]).logits
        losses = []
        for row, window in enumerate(batch):
            stop = len(window.ids) - 1
            counted = slice(stop - window.scored, stop)
            logits_SV = logits_BSV[row, counted].float()
            targets_S = ids_BS[row, 1:][counted]
            losses_S = F.cross_entropy(logits_SV, targets_S, reduction="none")
            losses.append(losses_S.double().sum().item())
        return losses
