"""What can't be trained on is told in a sentence, before the first step."""

from typing import Any

from megatron_let.errors import UsageError

SAMPLES_LOOKED_AT = 8


def check_loss_mask(dataset: Any) -> None:
    """Look at the first samples: their loss is 0/0 if no token of them counts.

    Raises:
        UsageError: none does.
    """
    samples = range(min(SAMPLES_LOOKED_AT, len(dataset)))
    if samples and not any(dataset[index]["loss_mask"].any() for index in samples):
        raise UsageError(
            f"No token of the first {len(samples)} samples counts in the loss: all are the "
            "tokenizer's padding, or, with --eod-mask-loss, its end of a document. Was the data "
            "made with this tokenizer?"
        )


def check_ids(ids: Any, rows: int, where: str) -> None:
    """Check that the embedding has a row for each token id of an array or a tensor.

    Raises:
        UsageError: naming the largest.
    """
    if len(ids) and (largest := int(ids.max())) >= rows:
        raise UsageError(
            f"{where} has the token id {largest}, and the model {rows} rows (the tokenizer's "
            "tokens, padded). Preprocess the data with this tokenizer."
        )
