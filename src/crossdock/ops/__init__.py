"""The row operations: the verbs of an exchange, on tensors alone.

They know nothing of ranks, buffers or handles. Each verb is described here once, with a worked
example that the tests execute, and implemented per kind of device.

B bytes or elements of a row, n rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from crossdock.ops import torch_ops

__all__ = ["gather_reduce", "place", "place_rows", "reduce", "send"]


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


def place_rows(
    landing: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, *, out: torch.Tensor
) -> None:
    """Copy landed rows to their slots; a row may go to several, other slots are not touched.

    Args:
        landing: [n, B] contiguous.
        rows: [p] int64, which landed row.
        slots: [p] int64, which row of `out` it becomes; all different.
        out: [m, B], same dtype, any strides.

    Example: landing=[[1],[2]], rows=[1,0,1], slots=[0,2,3], out=[[9],[9],[9],[9]] ->
        out [[2],[9],[1],[2]]
    """
    torch_ops.place_rows(landing, rows, slots, out=out)


def gather_reduce(
    rows: torch.Tensor,
    row_splits: torch.Tensor,
    slots: torch.Tensor,
    *,
    weights: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Sum weighted rows where they lie: what one rank has for each token, before it travels.

    Multiplies and adds in float32, in the order of `slots`, and rounds once; a product may be
    fused with its sum. Rows that no slot names are not read. A sum without rows is zero.

    Args:
        rows: [n, B] bf16, fp16 or fp32.
        row_splits: [N + 1] int64; sum `i` is of slots `row_splits[i]` to `row_splits[i + 1]`.
        slots: int64, indices into rows.
        weights: float32, one for each slot.
        dtype: of the result [N, B]; None for that of the rows.

    Example: rows=[[1],[2],[4]], row_splits=[0,2,3], slots=[0,2,1], weights=[3,0.5,1] -> [[5],[2]]
    """
    return torch_ops.gather_reduce(rows, row_splits, slots, weights=weights, dtype=dtype)


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
