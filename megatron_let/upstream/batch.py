"""A micro-batch, brought by Megatron's own functions to every rank that needs it."""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank

from megatron_let.data.checked import check_ids

Batch = dict[str, Any]
"""Tensors `[b, s, ...]` of a micro-batch by name; None where a stage does not need one.

Under context parallelism they are this rank's part of the sequence, and `WHOLE` holds them whole.
"""
WHOLE = "whole"
TEACHER_TOKENS, TEACHER_INDEX = "teacher_tokens", "teacher_index"
"""Of a teacher with another tokenizer: its rows, and where in them each token has its target."""
BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


def drawn_batch(
    args: Namespace,
    data_iterator: Iterator[Batch],
    *,
    holds_data: bool,
    reads_all: bool,
    further: Mapping[str, int],
) -> Batch:
    """Return the next micro-batch of an iterator.

    A rank that `holds_data` reads the files for those that share its micro-batches; a chunk that
    `reads_all` reads every key, not just what its stage's place asks for. `further` are rows of
    token ids or indices beside Megatron's, with their length.
    """
    rows = args.micro_batch_size if torch.is_grad_enabled() else args.eval_micro_batch_size
    batch: Batch = {}
    drawn = next(data_iterator) if holds_data else {}
    if holds_data:
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
        micro_batch_size=rows,
        seq_length=args.seq_length,
        mtp_on_this_rank=reads_all,  # upstream's word for "all the keys"
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch |= _on_this_tp_rank(drawn, further, rows)
    if args.context_parallel_size > 1:
        group = mpu.get_context_parallel_group()
        whole = {key: value for key, value in batch.items() if key != TEACHER_TOKENS}
        part = get_batch_on_this_cp_rank(whole, is_hybrid_cp=False, cp_group=group)
        return part | {WHOLE: batch}
    return batch


def _on_this_tp_rank(drawn: Batch, lengths: Mapping[str, int], rows: int) -> Batch:
    """Upstream's function of this name for keys that it does not know."""
    found: Batch = {}
    group, source = mpu.get_tensor_model_parallel_group(), mpu.get_tensor_model_parallel_src_rank()
    for key, length in lengths.items():
        device = torch.cuda.current_device()
        found[key] = torch.empty(rows, length, dtype=torch.int64, device=device)
        if drawn:
            found[key].copy_(drawn[key], non_blocking=True)
        torch.distributed.broadcast(found[key], source, group=group)
    return found
