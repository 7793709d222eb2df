"""Where rows lie: from the routing table to slots.

Everything here is deterministic arithmetic, done alike on every rank without a message. Rank-major
is the layout of the high-throughput calls: one row per (source rank, token), by source rank, then
by token. Expert slabs are that of the low-latency calls: one row per (token, local expert), by
expert, then source rank, then token; each expert owns as many rows as might come, or the rows of
all experts lie back to back (compact). Moving the rows is the transports' work, keeping the result
is the handle's.

T tokens here, S tokens of all ranks, K top-k, R ranks, N rows received here, L local experts,
M slots for the tokens of a rank, P rows in slabs.
`counts[i][j]` is the number of rows that rank `i` sends to rank `j`, as host integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from crossdock.errors import HandleError
from crossdock.routing import RoutingTable, SelectionTable

__all__ = [
    "Counts",
    "ExpertRows",
    "LocalSelection",
    "PartialSums",
    "RankMajor",
    "ReducePlan",
    "arrivals",
    "consecutive",
    "counts_of_prefix",
    "expert_rows",
    "local_selection",
    "pad_rows",
    "partial_sums",
    "rank_major",
    "recv_counts_per_expert",
    "reduce_plan",
    "send_head_of",
    "send_tokens",
    "surviving_counts",
    "transpose",
]

Counts = list[list[int]]


@dataclass(frozen=True)
class RankMajor:
    """The rank-major layout of one dispatch, seen from one rank.

    Attributes:
        rank_prefix_matrix: [R, R] int32; `[i][j]` = rows rank `j` receives from ranks <= `i`.
        table_rows: [N] int64, the row of the routing table that each received row is.
        recv_src_idx: [N] int32, index of each received row among its source's tokens.
    """

    rank_prefix_matrix: torch.Tensor
    table_rows: torch.Tensor
    recv_src_idx: torch.Tensor


def rank_major(table: RoutingTable, rank: int) -> RankMajor:
    """Lay out what `rank` receives.

    Example (2 ranks; rank 0 has tokens a, b, rank 1 has c): in rank [[1,0],[1,1],[1,0]] ->
        rank_prefix_matrix [[2,1],[3,1]]; rank 0 receives table rows [0,1,2] = a, b, c with
        recv_src_idx [0,1,0]; rank 1 receives [1] = b with [1]
    """
    offsets = table.token_offsets
    per_source = [
        table.is_token_in_rank[begin:end].sum(0, dtype=torch.int32)
        for begin, end in pairwise(offsets)
    ]
    prefix = torch.stack(per_source).cumsum(0, dtype=torch.int32)
    rows = table.is_token_in_rank[:, rank].nonzero().squeeze(1)
    lengths = torch.tensor(offsets[1:], device=rows.device) - torch.tensor(
        offsets[:-1], device=rows.device
    )
    first = torch.tensor(offsets[:-1], device=rows.device).repeat_interleave(lengths)
    return RankMajor(prefix, rows, (rows - first[rows]).int())


@dataclass(frozen=True)
class LocalSelection:
    """What the received rows want of the experts here.

    Attributes:
        topk_idx: [N, K] int64, local expert index where the slot is ours, -1 elsewhere; None when
            the call named no experts.
        topk_weights: [N, K] float32, the weight where the slot is ours, 0 elsewhere; or None.
    """

    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None

    def padded(self, num_rows: int) -> LocalSelection:
        """The same with exactly `num_rows` rows: dropped at the end, or filled with -1 and 0."""
        idx, weights = self.topk_idx, self.topk_weights
        return LocalSelection(
            None if idx is None else pad_rows(idx, num_rows, fill=-1),
            None if weights is None else pad_rows(weights, num_rows, fill=0),
        )


def pad_rows(rows: torch.Tensor, num_rows: int, *, fill: int) -> torch.Tensor:
    """Exactly `num_rows` rows: the first ones, and `fill` behind them.

    Example: [1,2,3], 2 rows -> [1,2]; 4 rows, fill -1 -> [1,2,3,-1]
    """
    if rows.shape[0] == num_rows:
        return rows
    kept = min(rows.shape[0], num_rows)
    out = torch.full((num_rows, *rows.shape[1:]), fill, dtype=rows.dtype, device=rows.device)
    out[:kept] = rows[:kept]
    return out


def local_selection(
    table: RoutingTable, table_rows: torch.Tensor, *, rank: int, experts_here: int
) -> LocalSelection:
    """The selections of the received rows, in local terms."""
    if table.topk_idx is None:
        return LocalSelection(None, None)
    local = table.topk_idx[table_rows].long() - rank * experts_here
    ours = (local >= 0) & (local < experts_here)
    weights = None
    if table.topk_weights is not None:
        weights = table.topk_weights[table_rows].masked_fill_(~ours, 0.0)
    return LocalSelection(local.masked_fill_(~ours, -1), weights)


def recv_counts_per_expert(
    table: RoutingTable, *, rank: int, experts_here: int, alignment: int
) -> list[int]:
    """Rows per local expert, each rounded up to a multiple of `alignment`.

    A token that names an expert twice counts twice, as in `num_tokens_per_expert`.
    """
    mine = table.num_tokens_per_expert[:, rank * experts_here : (rank + 1) * experts_here]
    counts: list[int] = mine.sum(0).tolist()
    return [-(-count // alignment) * alignment for count in counts]


def counts_of_prefix(rank_prefix_matrix: torch.Tensor) -> Counts:
    """The rows between all pairs of ranks: [[2,1],[3,1]] -> [[2,1],[1,0]]."""
    prefix: Counts = rank_prefix_matrix.tolist()
    above: Counts = [[0] * len(prefix), *prefix[:-1]]
    return [
        [upto - before for upto, before in zip(row, row_above, strict=True)]
        for row, row_above in zip(prefix, above, strict=True)
    ]


def surviving_counts(counts: Counts, num_rows: Sequence[int]) -> Counts:
    """The counts when rank `j` kept only its first `num_rows[j]` rows.

    Example: counts [[2,1],[1,0]], kept [2,1] -> [[2,1],[0,0]]
    """
    kept: Counts = [[0] * len(counts) for _ in counts]
    for dst, limit in enumerate(num_rows):
        room = limit
        for src, row in enumerate(counts):
            kept[src][dst] = min(row[dst], room)
            room -= kept[src][dst]
    return kept


def transpose(counts: Counts) -> Counts:
    """The way back: what `i` received from `j`, it sends to `j`."""
    return [list(column) for column in zip(*counts, strict=True)]


def send_tokens(is_token_in_rank: torch.Tensor) -> list[torch.Tensor]:
    """For each destination rank the tokens it gets, ascending, as int64 indices."""
    rank_of, token_of = is_token_in_rank.t().contiguous().nonzero(as_tuple=True)
    lengths = torch.bincount(rank_of, minlength=is_token_in_rank.shape[1])
    return list(torch.split(token_of, lengths.tolist()))


def send_head_of(is_token_in_rank: torch.Tensor) -> torch.Tensor:
    """[T, R] int32: which of the rows sent to a rank each token is, -1 where it is not sent.

    Example: [[1,0],[1,1],[0,1]] -> [[0,-1],[1,0],[-1,1]]
    """
    nth = is_token_in_rank.cumsum(0, dtype=torch.int32) - 1
    return nth.masked_fill_(~is_token_in_rank, -1)


@dataclass(frozen=True)
class ReducePlan:
    """Which returned rows make up each token: rows `slots[row_splits[t]:row_splits[t + 1]]`.

    Attributes:
        row_splits: [T + 1] int64.
        slots: int64, ascending by destination rank inside a token.
    """

    row_splits: torch.Tensor
    slots: torch.Tensor


def reduce_plan(send_head: torch.Tensor, returned: Sequence[int]) -> ReducePlan:
    """Plan the sum of what comes back.

    Args:
        send_head: [T, R], as in the handle.
        returned: rows that come back from each rank; rank after rank they form the returning zone.

    Raises:
        HandleError: more rows are to come back from a rank than were sent to it.

    Example: send_head [[0,-1],[1,0],[-1,1]], returned [2,2] -> zone r0:(0,1) r1:(2,3);
        row_splits [0,1,3,4], slots [0, 1,2, 3]
    """
    limits = torch.tensor(list(returned), dtype=torch.int64, device=send_head.device)
    base = torch.tensor(
        list(accumulate(returned, initial=0))[:-1], dtype=torch.int64, device=send_head.device
    )
    back = (send_head >= 0) & (send_head < limits)
    slots = (send_head + base)[back]
    if slots.numel() != sum(returned):
        raise HandleError("send_head and rank_prefix_matrix of the handle contradict each other")
    row_splits = torch.zeros(send_head.shape[0] + 1, dtype=torch.int64, device=send_head.device)
    torch.cumsum(back.sum(1), 0, out=row_splits[1:])
    return ReducePlan(row_splits, slots)


@dataclass(frozen=True)
class ExpertRows:
    """The expert layout of one dispatch, seen from one rank.

    Attributes:
        counts: [L, R] int64, rows of each local expert from each source rank.
        experts, sources, tokens: [P] int64, the local expert, source rank and source token of each
            row; ascending in this order.
    """

    counts: torch.Tensor
    experts: torch.Tensor
    sources: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def of_handle(
        cls, layout_range: torch.Tensor, src_info: torch.Tensor, *, compact: bool
    ) -> ExpertRows:
        """Read the layout back from the tensors of a handle."""
        counts = layout_range & 0xFFFFFFFF
        num_ranks = counts.shape[1]
        pairs = torch.arange(counts.numel(), device=counts.device)
        pair = pairs.repeat_interleave(counts.flatten())
        experts, sources = pair // num_ranks, pair % num_ranks
        found = cls(counts, experts, sources, experts)
        tokens = src_info.flatten()[found.slots(0 if compact else src_info.shape[1])]
        return cls(counts, experts, sources, tokens.long())

    @property
    def recv_count(self) -> torch.Tensor:
        """[L] int32, rows of each local expert."""
        return self.counts.sum(1, dtype=torch.int32)

    @property
    def layout_range(self) -> torch.Tensor:
        """[L, R] int64, `(begin << 32) | count`, `begin` counted inside the expert's rows."""
        return ((self.counts.cumsum(1) - self.counts) << 32) | self.counts

    def slots(self, slab_rows: int) -> torch.Tensor:
        """[P] int64, the slot of each row: in slabs of `slab_rows`; 0 for back to back."""
        here = torch.arange(self.experts.shape[0], device=self.experts.device)
        if not slab_rows:
            return here
        per_expert = self.counts.sum(1)
        begin = per_expert.cumsum(0) - per_expert
        return here - begin[self.experts] + self.experts * slab_rows


def expert_rows(local: torch.Tensor, table: SelectionTable, experts_here: int) -> ExpertRows:
    """Lay out what a rank receives, one row per distinct (token, expert).

    Args:
        local: [S, K], `table.local` of the rank.
        table: every rank's choices.
        experts_here: L.

    Example (L=2; rank 0 has tokens a, b, rank 1 has c): local [[0,1],[1,1],[0,-1]] ->
        counts [[1,1],[2,0]]; rows a, c of expert 0, then a, b of expert 1:
        experts [0,0,1,1], sources [0,1,0,0], tokens [0,0,0,1]
    """
    wanted = torch.zeros(
        (local.shape[0], experts_here + 1), dtype=torch.bool, device=local.device
    ).scatter_(1, torch.where(local < 0, experts_here, local), True)
    experts, rows = wanted[:, :experts_here].t().nonzero(as_tuple=True)
    sources = table.src_rank[rows]
    pair = experts * table.num_ranks + sources
    counts = torch.bincount(pair, minlength=experts_here * table.num_ranks)
    counts = counts.view(experts_here, table.num_ranks)
    return ExpertRows(counts, experts, sources, table.src_token[rows])


def arrivals(local: torch.Tensor, table: SelectionTable) -> torch.Tensor:
    """[S] int64: which of the rows that its source sends to a rank each token is.

    Valid for tokens that chose an expert of the rank whose `local` this is.

    Example (rank 0 has two tokens, rank 1 has two): chosen [[0],[0],[-1],[1]] -> [0,1,_,0]
    """
    coming = (local >= 0).any(1)
    nth = coming.cumsum(0) - 1
    lengths = torch.bincount(table.src_rank[coming], minlength=table.num_ranks)
    return nth - (lengths.cumsum(0) - lengths)[table.src_rank]


def consecutive(lengths: Sequence[int]) -> list[slice]:
    """Slices of these lengths, one behind the other: [2,1] -> [0:2, 2:3]."""
    ends = accumulate(lengths)
    return [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]


@dataclass(frozen=True)
class PartialSums:
    """Which rows of a rank are added up before they travel back, and where each sum goes.

    Attributes:
        num_back: sums for each source rank.
        row_splits: [N + 1] int64, over all sums, by source rank and token.
        slots: int64, the rows of each sum, by ascending top-k slot.
        weights: float32, what each of them is multiplied by.
    """

    num_back: list[int]
    row_splits: torch.Tensor
    slots: torch.Tensor
    weights: torch.Tensor


def partial_sums(
    rows: ExpertRows, slots: torch.Tensor, local: torch.Tensor, *, table: SelectionTable
) -> PartialSums:
    """Plan the sums of one rank: one for each token that chose an expert here.

    A chosen row that never came (its source was masked then) is left out of the sum.

    Args:
        rows: what this rank received.
        slots: [P], where each of these rows lies now.
        local: [S, K], `table.local` of this rank.
        table: every rank's choices, with weights.

    Example (L=2): token a chose experts [1,0] with weights [.5,.25]; its rows lie in slots
        7 (expert 0) and 9 (expert 1) -> row_splits [0,2], slots [9,7], weights [.5,.25]
    """
    lookup = _slot_of(rows, slots, local, table=table)
    chosen = local >= 0
    coming = chosen.any(1)
    splits = torch.zeros(int(coming.sum()) + 1, dtype=torch.int64, device=local.device)
    there = chosen & (lookup >= 0)
    torch.cumsum(there[coming].sum(1), 0, out=splits[1:])
    num_back = torch.bincount(table.src_rank[coming], minlength=table.num_ranks)
    if table.topk_weights is None:
        raise HandleError("sums are weighted, and no weights were given")
    return PartialSums(num_back.tolist(), splits, lookup[there], table.topk_weights[there])


def _slot_of(
    rows: ExpertRows, slots: torch.Tensor, local: torch.Tensor, *, table: SelectionTable
) -> torch.Tensor:
    """[S, K] int64: where the row of each local choice lies, -1 if there is none."""
    experts_here = rows.counts.shape[0]
    most = [int(each.max()) + 1 for each in (rows.tokens, table.src_token) if each.numel()]
    num_tokens = max(most, default=0)
    known = torch.full(
        (table.num_ranks * num_tokens * experts_here + 1,),
        -1,
        dtype=torch.int64,
        device=slots.device,
    )
    known[(rows.sources * num_tokens + rows.tokens) * experts_here + rows.experts] = slots
    token = (table.src_rank * num_tokens + table.src_token).unsqueeze(1)
    return known[torch.where(local < 0, -1, token * experts_here + local)]
