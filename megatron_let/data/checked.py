"""What can't be trained on is told in a sentence, before the first step."""

from typing import Any

from megatron_let.errors import UsageError


def check_loss_mask(dataset: Any) -> None:
    """Raise UsageError if no token of the first samples counts: their loss is 0/0."""
    samples = range(min(8, len(dataset)))
    if samples and not any(dataset[index]["loss_mask"].any() for index in samples):
        raise UsageError(
            f"No token of the first {len(samples)} samples counts in the loss: all are the "
            "tokenizer's padding, or, with --eod-mask-loss, its end of a document. Was the data "
            "made with this tokenizer?"
        )


def check_ids(ids: Any, rows: int, where: str) -> None:
    """Raise UsageError if the embedding has no row for a token id of an array or a tensor."""
    if len(ids) and (largest := int(ids.max())) >= rows:
        raise UsageError(
            f"{where} has the token id {largest}, and the model {rows} rows (the tokenizer's "
            "tokens, padded). Preprocess the data with this tokenizer."
        )
