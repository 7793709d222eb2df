"""The one place where results of ranks are compared with the oracle.

Every comparison returns what is wrong, as text, rank by rank; an empty list means equal. Moved data
must have the same bits; sums must be as near to the exact ones as their rounding allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from crossdock import reference

CALC_DIFF_BOUND = 5e-6
WEIGHTS_BOUND = 1e-9


class Received(NamedTuple):
    """What a dispatch returned on one rank, the handle's readable parts included."""

    x: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    counts: list[int]
    rank_prefix_matrix: torch.Tensor
    src_idx: torch.Tensor


class Returned(NamedTuple):
    """What a combine returned on one rank."""

    x: torch.Tensor
    topk_weights: torch.Tensor | None


def dispatch_faults(
    got: Sequence[Received], expected: Sequence[reference.ReferenceDispatch]
) -> list[str]:
    """What differs from the oracle in what the ranks received."""
    faults = []
    for rank, (mine, right) in enumerate(zip(got, expected, strict=True)):
        pairs = {
            **row_pairs(mine.x, right.recv_x),
            "recv_topk_idx": (mine.topk_idx, right.recv_topk_idx),
            "recv_topk_weights": (mine.topk_weights, right.recv_topk_weights),
            "rank_prefix_matrix": (mine.rank_prefix_matrix, right.rank_prefix_matrix),
            "recv_src_idx": (mine.src_idx, right.recv_src_idx),
        }
        found = [f"{name}: {fault}" for name, pair in pairs.items() if (fault := difference(*pair))]
        if mine.counts != right.num_recv_tokens_per_expert:
            found.append(f"counts: {mine.counts}, not {right.num_recv_tokens_per_expert}")
        faults += [f"rank {rank}: {fault}" for fault in found]
    return faults


def row_faults(got: Sequence, expected: Sequence) -> list[str]:
    """What differs in rows alone (or rows and scales), of every rank."""
    return [
        f"rank {rank}: {name}: {fault}"
        for rank, (mine, right) in enumerate(zip(got, expected, strict=True))
        for name, pair in row_pairs(mine, right).items()
        if (fault := difference(*pair))
    ]


def combine_faults(
    got: Sequence[Returned],
    expected: Sequence[reference.ReferenceCombine],
    num_addends: Sequence[torch.Tensor],
) -> list[str]:
    """What is too far from the exact sums; `num_addends` [T] of every rank says what was added."""
    faults = []
    for rank, (mine, right, num) in enumerate(zip(got, expected, num_addends, strict=True)):
        found = [sum_fault(mine.x, right, num), weights_fault(mine.topk_weights, right)]
        faults += [f"rank {rank}: {fault}" for fault in found if fault]
    return faults


def row_pairs(mine, right) -> dict:
    """What is to be compared of rows that may have scales on either side."""
    rows, scales = mine if isinstance(mine, tuple) else (mine, None)
    right_rows, right_scales = right if isinstance(right, tuple) else (right, None)
    return {"rows": (rows, right_rows), "scales": (scales, right_scales)}


def difference(mine: torch.Tensor | None, right: torch.Tensor | None) -> str:
    """How two tensors differ bit for bit; empty when they do not."""
    if mine is None or right is None:
        return "" if mine is right else f"{describe(mine)}, not {describe(right)}"
    if mine.dtype != right.dtype or mine.shape != right.shape:
        return f"{describe(mine)}, not {describe(right)}"
    wrong = (bits(mine) != bits(right)).flatten(1).any(1).nonzero().flatten().tolist()
    if not wrong:
        return ""
    row = wrong[0]
    return f"{len(wrong)} rows wrong, first row {row}: {head(mine[row])}, not {head(right[row])}"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of each row, so that NaN equals itself and -0 does not equal 0."""
    rows = tensor.contiguous()
    return (rows if rows.dim() > 1 else rows[:, None]).view(torch.uint8)


def describe(tensor: torch.Tensor | None) -> str:
    return "None" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def head(row: torch.Tensor) -> list:
    return (row.float() if row.is_floating_point() else row).flatten()[:6].tolist()


def sum_fault(
    mine: torch.Tensor, right: reference.ReferenceCombine, num_addends: torch.Tensor
) -> str:
    if mine.shape != right.combined.shape:
        return f"combined: {describe(mine)}, not {describe(right.combined)}"
    error = (mine.double() - right.combined).abs()
    allowed = rounding_bound(right, num_addends, mine.dtype)
    excess = (~(error <= allowed)).nonzero()
    if len(excess):
        where = tuple(excess[0].tolist())
        exact = right.combined[where].item()
        return f"combined {where}: {mine[where].item()}, exact {exact}, allowed {allowed[where]}"
    diff = reference.calc_diff(mine, right.combined)
    return "" if diff < CALC_DIFF_BOUND else f"combined: calc_diff {diff}"


def rounding_bound(
    right: reference.ReferenceCombine, num_addends: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """How far each element may lie from the exact sum: n float32 additions, then one rounding.

    The first addition is to zero and exact; each of the others errs by at most half a unit in the
    last place of a partial sum, and no partial sum exceeds the sum of absolute values (but for
    those very errors, for which it is taken 1 % larger). The final rounding errs by half a unit of
    the result, or of the smallest normal number where the result is smaller. A sum of one addend,
    which has the result's own dtype, is exact.
    """
    final, single = torch.finfo(dtype), torch.finfo(torch.float32)
    additions = (num_addends[:, None] - 1).clamp(min=0).double()
    summing = additions * (single.eps / 2) * right.magnitude * 1.01
    size = (right.combined.abs() + summing).clamp(min=final.smallest_normal)
    rounding = size * (final.eps / 2) * (additions > 0)
    return summing + rounding


def weights_fault(mine: torch.Tensor | None, right: reference.ReferenceCombine) -> str:
    if mine is None or right.topk_weights is None:
        same = mine is None and right.topk_weights is None
        return "" if same else f"topk_weights: {describe(mine)}, not {describe(right.topk_weights)}"
    if mine.dtype != torch.float32 or mine.shape != right.topk_weights.shape:
        return f"topk_weights: {describe(mine)}, not {describe(right.topk_weights)}"
    diff = reference.calc_diff(mine, right.topk_weights)
    return "" if diff < WEIGHTS_BOUND else f"topk_weights: calc_diff {diff}"
