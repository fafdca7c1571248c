"""A converted model in a layout of Megatron's: its logits there, a checkpoint from there."""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.training import training
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.checkpointing import save_checkpoint

from megatron_let.methods.table import build_method
from megatron_let.training import command_line
from megatron_let.upstream.async_saves import prepare_saves
from megatron_let.upstream.mended import mend_megatron
from tests.support.testing import forget_last_run


def load_run_and_save(argv: list[str], ids_MBS: np.ndarray) -> np.ndarray | None:
    """Load `--load` in the layout of `argv`, and save it from there at `--save` as iteration 1.

    Returns the logits `[m, b, s, V]` of the micro-batches `ids_MBS`, from the last stage.
    """
    forget_last_run()
    mend_megatron()
    sys.argv = ["pretrain_let.py", *argv]
    args = command_line.parse_arguments()
    prepare_saves(args)
    config = command_line.model_config(args, build_method(args))
    training.initialize_megatron(get_embedding_ranks=command_line.embedding_ranks(args))
    chunks, optimizer, scheduler = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, config),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    logits = _logits(chunks, torch.from_numpy(ids_MBS))
    save_checkpoint(1, chunks, optimizer, scheduler, 0)
    return logits


def _logits(chunks: list[Any], ids_MBS: torch.Tensor) -> np.ndarray | None:
    def forward_step(iterator: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
        ids_BS = next(iterator)
        positions_BS = torch.arange(ids_BS.shape[1]).expand_as(ids_BS)
        return model(ids_BS, positions_BS, None), collect

    def collect(output: torch.Tensor, non_loss_data: bool = False) -> torch.Tensor:
        return gather_from_tensor_model_parallel_region(output)

    for chunk in chunks:
        chunk.eval()
    iterators = [iter(ids_MBS) for _ in chunks]
    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks,
            num_microbatches=len(ids_MBS),
            seq_length=ids_MBS.shape[2],
            micro_batch_size=ids_MBS.shape[1],
            forward_only=True,
            collect_non_loss_data=True,
        )
    return torch.stack(outputs).numpy() if outputs else None
