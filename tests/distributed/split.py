"""Run on every rank of a group: the split teacher."""

import numpy as np
import torch

from megatron_let.teacher.host import needed_positions, states_SBD
from megatron_let.teacher.load import load_causal_lm, read_teacher_config
from megatron_let.teacher.stage import Rows, Teacher


class _CountingTeacher(Teacher):
    rows_run = 0

    def states_BSD(self, rows: Rows) -> torch.Tensor:
        self.rows_run += rows["tokens"].size(0)
        return super().states_BSD(rows)


def own_states(
    folder: str, rows: int, context_parallel: int, sequence_parallel: bool, dtype: str
) -> tuple[np.ndarray, int]:
    """This rank's states of some rows of 16 tokens, and how many rows it ran the teacher on."""
    config = read_teacher_config(folder)
    model = load_causal_lm(config, getattr(torch, dtype), torch.device("cpu"))
    teacher = _CountingTeacher(model, config.context)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (rows, 16), generator=generator)
    group = torch.distributed.group.WORLD
    tensor_parallel = group.size() // context_parallel
    needed = needed_positions(16, tensor_parallel, context_parallel, sequence_parallel)
    states = states_SBD(teacher, {"tokens": tokens}, group, needed)
    assert states.is_contiguous()
    return states.float().numpy(), teacher.rows_run
