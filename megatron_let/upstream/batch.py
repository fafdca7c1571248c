"""A micro-batch, brought by Megatron's own functions to every rank that needs it."""

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from megatron.core import mpu
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank

from megatron_let.data.checked import check_ids

Batch = dict[str, Any]
"""Tensors `[b, s, ...]` of a micro-batch by name; None where a stage does not need one.

Under context parallelism they are this rank's part of the sequence, and `WHOLE` holds them whole.
"""
WHOLE = "whole"
BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


def drawn_batch(
    args: Namespace, data_iterator: Iterator[Batch], *, holds_data: bool, reads_all: bool
) -> Batch:
    """Return the next micro-batch of an iterator.

    Args:
        args: the checked command line.
        data_iterator: on ranks that hold data.
        holds_data: whether this rank reads the files, for those that share its micro-batches.
        reads_all: whether the chunk reads every key, not just what its stage's place asks for.
    """
    batch: Batch = {}
    if holds_data:
        drawn = next(data_iterator)
        for key in ("tokens", "labels"):
            check_ids(drawn[key], args.padded_vocab_size, "The data")
        batch = {
            key: drawn[key].cuda(non_blocking=True) if key in drawn else None for key in BATCH_KEYS
        }
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=0 if holds_data else mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=reads_all,  # upstream's word for "all the keys"
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    if args.context_parallel_size > 1:
        group = mpu.get_context_parallel_group()
        part = get_batch_on_this_cp_rank(dict(batch), is_hybrid_cp=False, cp_group=group)
        return part | {WHOLE: batch}
    return batch
