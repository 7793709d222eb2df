"""The row operations in plain torch: the CPU path, and the readable definition.

The verbs are described in the package; here is only how torch does them fast. On CPU a row
operation is bound by memory, so each one touches a row once.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
from torch.nn import functional

__all__ = ["gather_reduce", "place", "place_rows", "reduce", "send"]

_BLOCK_ROWS = 64
_SUM_ROWS = 8
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


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


def place_rows(
    landing: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, *, out: torch.Tensor
) -> None:
    """See `crossdock.ops.place_rows`."""
    if out.stride(1) != 1 or landing.stride(1) != 1:
        _as_bits(out).index_copy_(0, slots, _as_bits(landing).index_select(0, rows))
        return
    word = _common_word(landing, out)
    out.view(word).index_copy_(0, slots, landing.view(word).index_select(0, rows))


def _common_word(*planes: torch.Tensor) -> torch.dtype:
    """The widest word that every row of these planes is made of: torch copies word by word."""
    sizes = [
        length * plane.itemsize
        for plane in planes
        for length in (plane.shape[1], plane.stride(0), plane.storage_offset())
    ]
    return next(word for word in _WORDS if not any(size % word.itemsize for size in sizes))


def gather_reduce(
    rows: torch.Tensor,
    row_splits: torch.Tensor,
    slots: torch.Tensor,
    *,
    weights: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """See `crossdock.ops.gather_reduce`."""
    num_sums = row_splits.shape[0] - 1
    out = torch.empty((num_sums, rows.shape[1]), dtype=dtype or rows.dtype, device=rows.device)
    bounds = [*row_splits[:-1:_SUM_ROWS].tolist(), slots.shape[0]]
    places = torch.arange(slots.shape[0], device=rows.device)
    for block, begin in enumerate(range(0, num_sums, _SUM_ROWS)):
        here = slice(bounds[block], bounds[block + 1])
        terms = rows.index_select(0, slots[here]).float()
        splits = row_splits[begin : begin + _SUM_ROWS + 1] - bounds[block]
        total = _weighted_sum(terms, splits, places[: len(terms)], weights=weights[here])
        out[begin : begin + _SUM_ROWS].copy_(total)
    return out


def _weighted_sum(
    terms: torch.Tensor, row_splits: torch.Tensor, places: torch.Tensor, *, weights: torch.Tensor
) -> torch.Tensor:
    """Sum float32 rows that lie one behind the other, by segment, each times its weight."""
    if terms.device.type != "cpu" or not terms.numel():
        return _segment_sum_by_place(terms, row_splits, places, weights=weights)
    return functional.embedding_bag(
        places,
        terms,
        row_splits,
        mode="sum",
        per_sample_weights=weights,
        include_last_offset=True,
    )


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
def _hear_warnings() -> None:
    """Have torch say, unheard, what it says once a process of sparse tensors: they are in beta."""
    index = torch.zeros(1, dtype=torch.int64, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _csr(index, index[:0], values=index[:0].float(), size=(0, 1))


def _csr(
    row_splits: torch.Tensor, slots: torch.Tensor, *, values: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    return torch.sparse_csr_tensor(
        row_splits,
        slots,
        values,
        size=size,
        dtype=values.dtype,
        device=values.device,
        check_invariants=False,
    )


def _segment_sum(rows: torch.Tensor, row_splits: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Sum rows by segment, in slot order, accumulating in float32 and rounding once.

    A sparse product with ones is the one torch operation that does this in a single pass; it
    multiplies only listed rows, so that NaN in other rows is never read.
    """
    num_tokens = row_splits.shape[0] - 1
    if not slots.numel() or not rows.shape[1]:
        return torch.zeros((num_tokens, rows.shape[1]), dtype=rows.dtype, device=rows.device)
    if rows.device.type != "cpu":
        return _segment_sum_by_place(rows, row_splits, slots)
    ones = torch.ones(slots.shape, dtype=rows.dtype, device=rows.device)
    _hear_warnings()
    chosen = _csr(row_splits, slots, values=ones, size=(num_tokens, rows.shape[0]))
    total: torch.Tensor = torch.sparse.mm(chosen, rows, "sum")
    return total


def _segment_sum_by_place(
    rows: torch.Tensor,
    row_splits: torch.Tensor,
    slots: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same on any device: every token's first row, then every token's second, and so on.

    The order of the sums is fixed, which `index_add_` does not promise on CUDA.
    """
    lengths = row_splits.diff()
    total = torch.zeros((lengths.shape[0], rows.shape[1]), dtype=torch.float32, device=rows.device)
    for place in range(int(lengths.max()) if lengths.numel() else 0):
        tokens = (lengths > place).nonzero().squeeze(1)
        at = row_splits[tokens] + place
        terms = rows[slots[at]].float()
        total[tokens] += terms if weights is None else terms * weights[at].unsqueeze(1)
    return total.to(rows.dtype)
