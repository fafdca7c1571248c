"""Rows that are longer than the teacher's context, read in overlapping windows.

The first window covers the first `context` tokens. Each later one is moved on by half a context and
contributes its new tokens only, so that every token but the first ones is read behind at least
half a context of text. The last window ends with the row.
"""

import torch

from megatron_let.teacher.work import window_ends


def split_windows(tokens_BS: torch.Tensor, context: int) -> torch.Tensor:
    """Return the windows of all rows, `[windows x B, context]`, window by window."""
    ends = window_ends(tokens_BS.size(1), context)
    return torch.cat([tokens_BS[:, end - context : end] for end in ends])


def join_windows(states_WCD: torch.Tensor, length: int) -> torch.Tensor:
    """Put the new tokens of each window together again, `[B, length, D]`."""
    context = states_WCD.size(1)
    ends = window_ends(length, context)
    windows = states_WCD.chunk(len(ends))
    starts = [0, *ends[:-1]]
    return torch.cat(
        [
            window[:, context - (end - start) :]
            for window, start, end in zip(windows, starts, ends, strict=True)
        ],
        dim=1,
    )
