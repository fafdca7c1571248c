"""The teacher's rows, dealt over the ranks of its stage that share them.

All ranks of a tensor- and context-parallel group have the same rows to guide. Each runs the teacher
on its share of them and then gets from the others what its own part of the student needs: every
row, and of each the positions that lie on this rank.
"""

import math
from typing import Any

import torch
import torch.distributed as dist

from megatron_let.teacher.stage import Rows, Teacher


def states_SBD(
    teacher: Teacher, rows: Rows, group: Any, positions_RS: torch.Tensor
) -> torch.Tensor:
    """Return the teacher's states of all rows at this rank's positions, `[own S, rows, D]`.

    Args:
        teacher: the same on all ranks of the group.
        rows: whole and the same on all ranks. A number of rows that does not divide by the ranks
            is filled up, which costs time and nothing else.
        group: the process group.
        positions_RS: the positions that each rank of the group needs, see `needed_positions`.
    """
    ranks, number = group.size(), rows["tokens"].size(0)
    share = math.ceil(number / ranks)
    device = rows["tokens"].device
    own = torch.arange(group.rank() * share, (group.rank() + 1) * share, device=device) % number
    states_BSD = teacher.states_BSD({key: value[own] for key, value in rows.items()})
    if ranks == 1:
        return states_BSD.transpose(0, 1).contiguous()
    wanted = states_BSD[:, positions_RS.to(device)].transpose(0, 1).contiguous()
    received = torch.empty_like(wanted)  # [rank it comes from, its rows, own positions, D]
    dist.all_to_all_single(received, wanted, group=group)
    return received.flatten(0, 1)[:number].transpose(0, 1).contiguous()


def needed_positions(
    length: int, tensor_parallel: int, context_parallel: int, sequence_parallel: bool
) -> torch.Tensor:
    """Positions of a row that each rank of a tensor- and context-parallel group holds, `[R, S]`.

    Context parallelism gives a rank two of `2 * context_parallel` chunks, one from each end
    (Megatron's `get_batch_on_this_cp_rank`); sequence parallelism cuts that into contiguous slices.
    Tensor-parallel ranks are neighbours in the group.
    """
    chunks = torch.arange(length).chunk(2 * context_parallel)
    pairs = [torch.cat([chunks[i], chunks[-1 - i]]) for i in range(context_parallel)]
    if sequence_parallel:
        return torch.cat([pair.view(tensor_parallel, -1) for pair in pairs])
    return torch.stack(pairs).repeat_interleave(tensor_parallel, dim=0)


def own_slice(tensor_S: torch.Tensor, group: Any) -> torch.Tensor:
    """This rank's contiguous slice of the sequence, the first dimension."""
    return tensor_S.chunk(group.size())[group.rank()].contiguous()
