"""The oracle: what dispatch and combine must return, computed the slow and obvious way.

It exists to judge the library, so it shares no code with it: the whole world sits in one process,
and every answer is a loop over ranks, tokens and slots, with sums in float64. Read it to learn what
the right answer is; how rows really travel, and how fast, is the business of every other file. It
judges values only: padding, handles' further fields and events are left to the tests.

One world is used in all examples below: 2 ranks, 4 experts (0 and 1 live on rank 0, 2 and 3 on
rank 1), two choices a token, three tokens on rank 0 and one on rank 1::

    topk_idxs = [tensor([[0, 2], [1, -1], [3, 3]]), tensor([[2, 0]])]

Letters: R ranks, E experts, T tokens of a rank, K choices a token, H hidden, N rows received.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "ReferenceCombine",
    "ReferenceDispatch",
    "ReferenceLayout",
    "arrivals",
    "calc_diff",
    "combine",
    "dispatch",
    "layout",
]

Rows: TypeAlias = "Tensor | tuple[Tensor, Tensor]"
"""Rows `[T, H]`, or quantised rows with their scales `([T, H], [T, S])`."""

Origin: TypeAlias = tuple[int, int]
"""Where a row comes from: (source rank, token index there)."""


class ReferenceLayout(NamedTuple):
    """Where the tokens of one rank go: counts `[R]` and `[E]` int32, presence `[T, R]` bool."""

    num_tokens_per_rank: Tensor
    num_tokens_per_expert: Tensor
    is_token_in_rank: Tensor


class ReferenceDispatch(NamedTuple):
    """What one rank receives.

    Attributes:
        recv_x: Rows `[N, H]`, or (rows, scales), bit for bit as they were sent.
        recv_topk_idx: `[N, K]` int64, local expert, -1 where the slot is not this rank's; or None.
        recv_topk_weights: `[N, K]` float32, 0 where the slot is not this rank's; or None.
        num_recv_tokens_per_expert: Rows of each local expert, rounded up to the alignment.
        rank_prefix_matrix: `[R, R]` int32; `[i][j]` = rows that rank j receives from ranks <= i.
        recv_src_idx: `[N]` int32, each row's token index on its source rank.
    """

    recv_x: Rows
    recv_topk_idx: Tensor | None
    recv_topk_weights: Tensor | None
    num_recv_tokens_per_expert: list[int]
    rank_prefix_matrix: Tensor
    recv_src_idx: Tensor


class ReferenceCombine(NamedTuple):
    """What one rank gets back.

    Attributes:
        combined: `[T, H]` float64, the exact sum of each token's rows and biases.
        topk_weights: `[T, K]` float64, the exact sum of what the ranks send per slot; or None.
        magnitude: `[T, H]` float64, the sum of the absolute values of the same addends: what a
            bound on rounding errors is proportional to.
    """

    combined: Tensor
    topk_weights: Tensor | None
    magnitude: Tensor


def layout(topk_idx: Tensor, num_experts: int, num_ranks: int) -> ReferenceLayout:
    """Say where the tokens of one rank go.

    A token counts once per rank, however many of that rank's experts it chose, and once per
    occurrence for each expert; -1 chooses nothing.

    Example: rank 0 of the world above, `topk_idx = [[0, 2], [1, -1], [3, 3]]`, gives
    `num_tokens_per_rank = [2, 2]`, `num_tokens_per_expert = [1, 1, 1, 2]` and
    `is_token_in_rank = [[yes, yes], [yes, no], [no, yes]]`.

    Args:
        topk_idx: `[T, K]` integers, global expert ids, -1 = none.
        num_experts: E, a multiple of R.
        num_ranks: R.
    """
    num_local = num_experts // num_ranks
    per_rank = [0] * num_ranks
    per_expert = [0] * num_experts
    present = [[False] * num_ranks for _ in range(len(topk_idx))]
    for token, choices in enumerate(topk_idx.tolist()):
        for expert in choices:
            if expert >= 0:
                per_expert[expert] += 1
                present[token][expert // num_local] = True
        for rank in range(num_ranks):
            per_rank[rank] += present[token][rank]
    return ReferenceLayout(
        torch.tensor(per_rank, dtype=torch.int32, device="cpu"),
        torch.tensor(per_expert, dtype=torch.int32, device="cpu"),
        torch.tensor(present, dtype=torch.bool, device="cpu").reshape(-1, num_ranks),
    )


def arrivals(is_token_in_ranks: Sequence[Tensor]) -> list[list[Origin]]:
    """List for every rank the origins of its rows: by source rank, inside a source by token.

    Example: the world above gives `[[(0, 0), (0, 1), (1, 0)], [(0, 0), (0, 2), (1, 0)]]`.

    Args:
        is_token_in_ranks: Of every rank, `[T, R]` bool.
    """
    num_ranks = len(is_token_in_ranks)
    origins: list[list[Origin]] = [[] for _ in range(num_ranks)]
    for source, presence in enumerate(is_token_in_ranks):
        for token, present in enumerate(presence.tolist()):
            for rank in range(num_ranks):
                if present[rank]:
                    origins[rank].append((source, token))
    return origins


def dispatch(
    xs: Sequence[Rows],
    topk_idxs: Sequence[Tensor] | None,
    topk_weights: Sequence[Tensor] | None = None,
    *,
    num_experts: int,
    expert_alignment: int = 1,
    is_token_in_ranks: Sequence[Tensor] | None = None,
    num_tokens_per_experts: Sequence[Tensor] | None = None,
) -> list[ReferenceDispatch]:
    """Say what every rank receives.

    Example: the world above with `xs = [[[10], [20], [30]], [[40]]]` and weights
    `[[[.1, .2], [.3, .4], [.5, .6]], [[.7, .8]]]` gives rank 1::

        recv_x = [[10], [30], [40]]         recv_src_idx = [0, 2, 0]
        recv_topk_idx = [[-1, 0], [1, 1], [0, -1]]
        recv_topk_weights = [[0, .2], [.5, .6], [.7, 0]]
        num_recv_tokens_per_expert = [2, 2]
        rank_prefix_matrix = [[2, 2], [3, 3]]

    Args:
        xs: Of every rank, its rows `[T, H]` or (rows, scales); dtypes and widths alike.
        topk_idxs: Of every rank, `[T, K]` integers; None where presence and counts alone route.
        topk_weights: Of every rank, `[T, K]` float32; or None.
        num_experts: E, a multiple of R.
        expert_alignment: What each expert's count is rounded up to.
        is_token_in_ranks: Of every rank, `[T, R]` bool; decides what travels. Derived from
            `topk_idxs` where it is not given.
        num_tokens_per_experts: Of every rank, `[E]`; likewise.
    """
    num_ranks = len(xs)
    layouts = [layout(topk_idx, num_experts, num_ranks) for topk_idx in topk_idxs or ()]
    presence = is_token_in_ranks or [each.is_token_in_rank for each in layouts]
    counts = num_tokens_per_experts or [each.num_tokens_per_expert for each in layouts]
    origins = arrivals(presence)
    prefixes = _rank_prefix_matrix(origins)
    received = []
    for rank in range(num_ranks):
        experts = _local_experts(rank, num_experts, num_ranks)
        idx, weights = _slots(origins[rank], topk_idxs, topk_weights, experts=experts)
        totals = [sum(int(count[expert]) for count in counts) for expert in experts]
        aligned = [-(-total // expert_alignment) * expert_alignment for total in totals]
        tokens = torch.tensor([t for _, t in origins[rank]], dtype=torch.int32, device="cpu")
        rows = _gather(xs, origins[rank])
        received.append(ReferenceDispatch(rows, idx, weights, aligned, prefixes, tokens))
    return received


def combine(
    rows: Sequence[Tensor],
    topk_idxs: Sequence[Tensor] | None,
    num_experts: int = 0,
    *,
    topk_weights: Sequence[Tensor] | None = None,
    biases: Sequence[Sequence[Tensor]] | None = None,
    is_token_in_ranks: Sequence[Tensor] | None = None,
) -> list[ReferenceCombine]:
    """Say what every rank gets back: for each token the sum of its rows, then its biases.

    Nothing is weighted. `topk_weights` travel beside the rows and are summed the same way, slot by
    slot. A token that went nowhere gets zeros, plus its biases.

    Example: in the world above each rank sends back what it received, so token 0 of rank 0, which
    went to both ranks, comes back twice::

        rows = [[[10], [20], [40]], [[10], [30], [40]]]
        combined = [[[20], [20], [30]], [[80]]]

    Args:
        rows: Of every rank, `[N, H]`: one row for each that dispatch gave it, in the same order.
            Rows beyond N are not read.
        topk_idxs: The choices that dispatch was given; None if `is_token_in_ranks` routed.
        num_experts: E, a multiple of R; only needed with `topk_idxs`.
        topk_weights: Of every rank, `[N, K]`; or None.
        biases: Of every rank, the tensors `[T, H]` that are added to its sums; or None.
        is_token_in_ranks: As dispatch was given it.
    """
    num_ranks = len(rows)
    layouts = [layout(topk_idx, num_experts, num_ranks) for topk_idx in topk_idxs or ()]
    presence = is_token_in_ranks or [each.is_token_in_rank for each in layouts]
    num_tokens = [len(present) for present in presence]
    origins = arrivals(presence)
    added = biases or [()] * num_ranks
    sums = _sum_back(rows, origins, num_tokens)
    sizes = _sum_back([row.double().abs() for row in rows], origins, num_tokens)
    weights: Sequence[Tensor | None] = [None] * num_ranks
    if topk_weights is not None:
        weights = _sum_back(topk_weights, origins, num_tokens)
    for rank in range(num_ranks):
        for bias in added[rank]:
            sums[rank] += bias.double()
            sizes[rank] += bias.double().abs()
    return [ReferenceCombine(*each) for each in zip(sums, weights, sizes, strict=True)]


def calc_diff(a: Tensor, b: Tensor) -> float:
    """Say how far apart two tensors are, as one number: `1 - 2 sum(ab) / sum(aa + bb)`.

    Equal tensors give 0 (also two empty or all-zero ones), opposite ones 2. A NaN anywhere gives
    NaN, which no bound admits.

    Example: `a = [1, 0]`, `b = [1, 1]` gives `1 - 2 * 1 / 3`.
    """
    x, y = a.double().flatten(), b.double().flatten()
    denominator = (x * x + y * y).sum().item()
    if denominator == 0:
        return 0.0
    return float(1 - 2 * (x * y).sum().item() / denominator)


def _local_experts(rank: int, num_experts: int, num_ranks: int) -> range:
    num_local = num_experts // num_ranks
    return range(rank * num_local, (rank + 1) * num_local)


def _rank_prefix_matrix(origins: Sequence[Sequence[Origin]]) -> Tensor:
    num_ranks = len(origins)
    matrix = torch.zeros((num_ranks, num_ranks), dtype=torch.int32, device="cpu")
    for i in range(num_ranks):
        for j in range(num_ranks):
            matrix[i, j] = sum(source <= i for source, _ in origins[j])
    return matrix


def _gather(xs: Sequence[Rows], origins: Sequence[Origin]) -> Rows:
    """Copy the rows of the given origins, and their scales if they have some."""
    parts = [x if isinstance(x, tuple) else (x,) for x in xs]
    gathered = [
        _gather_part([each[part] for each in parts], origins) for part in range(len(parts[0]))
    ]
    return gathered[0] if len(gathered) == 1 else (gathered[0], gathered[1])


def _gather_part(tensors: Sequence[Tensor], origins: Sequence[Origin]) -> Tensor:
    width, dtype = tensors[0].shape[1], tensors[0].dtype
    gathered = torch.empty((len(origins), width), dtype=dtype, device="cpu")
    for row, (source, token) in enumerate(origins):
        gathered[row] = tensors[source][token]
    return gathered


def _slots(
    origins: Sequence[Origin],
    topk_idxs: Sequence[Tensor] | None,
    topk_weights: Sequence[Tensor] | None,
    *,
    experts: range,
) -> tuple[Tensor | None, Tensor | None]:
    """Give each received row's choices as seen by the rank that owns `experts`."""
    if topk_idxs is None:
        return None, None
    num_topk = topk_idxs[0].shape[1]
    idx = torch.full((len(origins), num_topk), -1, dtype=torch.int64, device="cpu")
    weights = torch.zeros((len(origins), num_topk), dtype=torch.float32, device="cpu")
    for row, (source, token) in enumerate(origins):
        for slot, expert in enumerate(topk_idxs[source][token].tolist()):
            if expert in experts:
                idx[row, slot] = expert - experts.start
                if topk_weights is not None:
                    weights[row, slot] = topk_weights[source][token, slot]
    return idx, (None if topk_weights is None else weights)


def _sum_back(
    rows: Sequence[Tensor], origins: Sequence[Sequence[Origin]], num_tokens: Sequence[int]
) -> list[Tensor]:
    """Add every rank's rows, in float64, to the tokens they came from."""
    width = rows[0].shape[1]
    sums = [torch.zeros((num, width), dtype=torch.float64, device="cpu") for num in num_tokens]
    for rank, sent in enumerate(rows):
        for row, (source, token) in enumerate(origins[rank]):
            sums[source][token] += sent[row].double()
    return sums
