"""The row operations in plain torch: the CPU path, and the readable definition.

The verbs are described in the package; here is only how torch does them fast. On CPU a row
operation is bound by memory, so each one touches a row once.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch

__all__ = ["place", "reduce", "send"]

_BLOCK_ROWS = 64


def send(rows: torch.Tensor, tokens: torch.Tensor | slice, landing: torch.Tensor) -> None:
    """See `crossdock.ops.send`."""
    if isinstance(tokens, slice):
        landing.copy_(rows[tokens])
        return
    torch.index_select(_as_bits(rows), 0, tokens, out=_as_bits(landing))


def _as_bits(rows: torch.Tensor) -> torch.Tensor:
    """fp8 has no index_select everywhere; bytes do."""
    return rows.view(torch.uint8) if rows.dtype.itemsize == 1 else rows


def place(landing: torch.Tensor, num_rows: int) -> torch.Tensor:
    """See `crossdock.ops.place`."""
    out = torch.empty((num_rows, landing.shape[1]), dtype=landing.dtype, device=landing.device)
    kept = min(num_rows, landing.shape[0])
    out[:kept].copy_(landing[:kept])
    _as_bits(out[kept:]).zero_()
    return out


def reduce(
    rows: torch.Tensor,
    row_splits: torch.Tensor,
    slots: torch.Tensor,
    *,
    bias: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """See `crossdock.ops.reduce`."""
    if not bias:
        return _segment_sum(rows, row_splits, slots)
    out = torch.empty(
        (row_splits.shape[0] - 1, rows.shape[1]), dtype=rows.dtype, device=rows.device
    )
    for begin in range(0, out.shape[0], _BLOCK_ROWS):
        splits = row_splits[begin : begin + _BLOCK_ROWS + 1]
        block = rows[slots[splits[0] : splits[-1]]].float()
        here = torch.arange(block.shape[0], device=rows.device)
        total = _segment_sum(block, splits - splits[0], here)
        for term in bias:
            total += term[begin : begin + _BLOCK_ROWS].float()
        out[begin : begin + _BLOCK_ROWS].copy_(total)
    return out


@functools.cache
def _hear_beta_warning() -> None:
    """Have torch say once, unheard, that sparse tensors are in beta; it says so once a process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(1, dtype=torch.float32, device="cpu").to_sparse_csr()


def _segment_sum(rows: torch.Tensor, row_splits: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Sum rows by segment, in slot order, accumulating in float32 and rounding once.

    A sparse product with ones is the one torch operation that does this in a single pass; it
    multiplies only listed rows, so that NaN in other rows is never read.
    """
    num_tokens = row_splits.shape[0] - 1
    if not slots.numel() or not rows.shape[1]:
        return torch.zeros((num_tokens, rows.shape[1]), dtype=rows.dtype, device=rows.device)
    ones = torch.ones(slots.shape, dtype=rows.dtype, device=rows.device)
    size = (num_tokens, rows.shape[0])
    _hear_beta_warning()
    chosen = torch.sparse_csr_tensor(
        row_splits,
        slots,
        ones,
        size=size,
        dtype=rows.dtype,
        device=rows.device,
        check_invariants=False,
    )
    total: torch.Tensor = torch.sparse.mm(chosen, rows, "sum")
    return total
