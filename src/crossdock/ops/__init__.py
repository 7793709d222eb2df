"""The row operations: the verbs of an exchange, on tensors alone.

They know nothing of ranks, buffers or handles. Each verb is described here once, with a worked
example that the tests execute, and implemented per kind of device.

B bytes or elements of a row, n rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from crossdock.ops import torch_ops

__all__ = ["place", "reduce", "send"]


def send(rows: torch.Tensor, tokens: torch.Tensor | slice, landing: torch.Tensor) -> None:
    """Write chosen rows to where they land.

    Args:
        rows: [T, B] contiguous.
        tokens: [n] int64, ascending, which rows to send; or a slice, when they lie together.
        landing: [n, B], same dtype, contiguous; the receiver's memory.

    Example: rows=[[10],[20],[30]], tokens=[0,2] -> landing [[10],[30]]
    """
    torch_ops.send(rows, tokens, landing)


def place(landing: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Copy landed rows to a tensor of the caller's own, with exactly `num_rows` rows.

    Args:
        landing: [n, B] rows in their final order.
        num_rows: rows of the result; landed rows beyond it are dropped, missing ones are zero.

    Example: landing=[[1],[2],[3]], num_rows=2 -> [[1],[2]]; num_rows=4 -> [[1],[2],[3],[0]]
    """
    return torch_ops.place(landing, num_rows)


def reduce(
    rows: torch.Tensor,
    row_splits: torch.Tensor,
    slots: torch.Tensor,
    *,
    bias: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """Sum the rows that belong to each token.

    Adds in the order of `slots`, in float32, then the biases, and rounds once to the rows' dtype.
    A token without rows gives zeros (plus bias). Rows that no slot names are not read.

    Args:
        rows: [n, B] bf16, fp16 or fp32.
        row_splits: [T + 1] int64; token `t` owns slots `row_splits[t]` to `row_splits[t + 1]`.
        slots: int64, indices into rows.
        bias: tensors [T, B] to add.

    Example: rows=[[1],[2],[3]], row_splits=[0,2,2,3], slots=[0,2,1] -> [[4],[0],[2]]
    """
    return torch_ops.reduce(rows, row_splits, slots, bias=bias)
