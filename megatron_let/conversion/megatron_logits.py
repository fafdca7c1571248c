"""What Megatron itself computes from a checkpoint, on CPU; a program, to have its own process.

    python -m megatron_let.conversion.megatron_logits CHECKPOINT TOKENS.npy LOGITS.npy DTYPE

The CPU platform changes torch for the whole process, so who compares must not be in it.
"""

import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

from megatron_let.upstream import cpu

cpu.activate_if_wanted(["--cpu"])  # before Megatron is imported

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.training.arguments import parse_args  # noqa: E402

from megatron_let.checkpoint.reader import Checkpoint  # noqa: E402
from megatron_let.conversion.configs import FLAG_OF  # noqa: E402
from megatron_let.upstream import safe_loading  # noqa: E402
from megatron_let.upstream.accelerators import platform_defaults  # noqa: E402
from megatron_let.upstream.mended import gpt_config  # noqa: E402

TRANSFORMER_ENGINES = ("use_te_activation_func", "use_transformer_engine_op_fuser")


def model_arguments(checkpoint: Checkpoint) -> Namespace:
    """Return the arguments of a run that holds the checkpoint's model on one rank in float32.

    Those that tell a family are the checkpoint's. How the run was laid out, sped up or kept small
    does not change the function, and may be impossible here.
    """
    sys.argv = ["pretrain_let.py", "--cpu"]
    args = parse_args(ignore_unknown_args=True)
    saved = vars(checkpoint.args())
    told = {name: saved[name] for name in (*FLAG_OF, "padded_vocab_size") if name in saved}
    here = {"params_dtype": torch.float32} | dict.fromkeys(TRANSFORMER_ENGINES, False)
    vars(args).update(told | platform_defaults() | here)
    return args


def main(folder: str, tokens: str, logits: str, rounded_to: str) -> None:
    """Write float32 logits `[b, s, V]` for token ids `[b, s]`, of weights rounded to a type."""
    safe_loading.install()
    checkpoint = Checkpoint(Path(folder))
    config = gpt_config(model_arguments(checkpoint))
    torch.distributed.init_process_group("gloo", "tcp://127.0.0.1:0", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = config.get_builder_cls()(config).build_model(groups).eval()
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, folder)
    model.load_state_dict(state["model"])
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, rounded_to)).float()
    ids_BS = torch.from_numpy(np.load(tokens, allow_pickle=False))
    positions_BS = torch.arange(ids_BS.shape[1]).expand_as(ids_BS)
    with torch.no_grad():
        logits_BSV = model(ids_BS, positions_BS, None)
    np.save(logits, logits_BSV.float().numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
