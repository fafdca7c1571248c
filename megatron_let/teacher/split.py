"""The teacher's rows, dealt over the tensor-parallel ranks of its stage.

All ranks of a tensor-parallel group hold the same tokens. Each runs the teacher on its share of the
rows and then gets from the others what its own part of the student needs: every row, and of each
its slice of the sequence under sequence parallelism, the whole of it without.
"""

import math
from typing import Any

import torch
import torch.distributed as dist

from megatron_let.teacher.stage import Rows, Teacher


def states_SBD(teacher: Teacher, rows: Rows, group: Any, sequence_parallel: bool) -> torch.Tensor:
    """Return the teacher's states of all rows, sequence first, of this rank's slice under SP.

    Args:
        teacher: the same on all ranks of the group.
        rows: the same on all ranks. A number of rows that does not divide by the ranks is filled
            up, which costs time and nothing else.
        group: the tensor-parallel process group.
        sequence_parallel: whether each rank needs its contiguous slice of the sequence only.
    """
    ranks, number = group.size(), rows["tokens"].size(0)
    if ranks == 1:
        return teacher.states_BSD(rows).transpose(0, 1).contiguous()
    share = math.ceil(number / ranks)
    first = group.rank() * share
    device = rows["tokens"].device
    own = torch.arange(first, first + share, device=device) % number
    states_BSD = teacher.states_BSD({key: value[own] for key, value in rows.items()})
    exchange = _slices_of_all_rows if sequence_parallel else _all_rows
    return exchange(states_BSD, group)[:number].transpose(0, 1).contiguous()


def own_slice(tensor_S: torch.Tensor, group: Any) -> torch.Tensor:
    """This rank's contiguous slice of the sequence, the first dimension."""
    return tensor_S.chunk(group.size())[group.rank()].contiguous()


def _slices_of_all_rows(states_BSD: torch.Tensor, group: Any) -> torch.Tensor:
    slices = states_BSD.unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()
    received = torch.empty_like(slices)  # [rank it comes from, its rows, own slice, D]
    dist.all_to_all_single(received, slices, group=group)
    return received.flatten(0, 1)


def _all_rows(states_BSD: torch.Tensor, group: Any) -> torch.Tensor:
    shape = (group.size() * states_BSD.size(0), *states_BSD.shape[1:])
    received = states_BSD.new_empty(shape)
    dist.all_gather_into_tensor(received, states_BSD.contiguous(), group=group)
    return received
