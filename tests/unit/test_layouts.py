"""Where rows lie, checked against the definition in words."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdock import layouts
from crossdock.errors import HandleError
from crossdock.routing import RoutingShare, RoutingTable


@st.composite
def presences(draw: st.DrawFn) -> list[torch.Tensor]:
    """is_token_in_rank of every rank of a group, any token counts."""
    num_ranks = draw(st.integers(1, 4))
    row = st.lists(st.booleans(), min_size=num_ranks, max_size=num_ranks)
    return [
        torch.tensor(draw(st.lists(row, max_size=8)), dtype=torch.bool).view(-1, num_ranks)
        for _ in range(num_ranks)
    ]


def table_of(in_rank: list[torch.Tensor]) -> RoutingTable:
    per_expert = torch.zeros(len(in_rank), dtype=torch.int32)
    return RoutingTable.from_shares([RoutingShare(one, per_expert) for one in in_rank])


@given(presences())
@settings(deadline=None)
def test_rank_major_is_by_source_rank_then_token(in_rank: list[torch.Tensor]) -> None:
    table = table_of(in_rank)
    for rank in range(len(in_rank)):
        layout = layouts.rank_major(table, rank)
        wanted = [(s, t) for s, one in enumerate(in_rank) for t in range(len(one)) if one[t, rank]]
        assert layout.recv_src_idx.tolist() == [t for _, t in wanted]
        assert layout.table_rows.tolist() == [table.token_offsets[s] + t for s, t in wanted]
        assert layout.rank_prefix_matrix[:, rank].tolist() == [
            sum(s <= upto for s, _ in wanted) for upto in range(len(in_rank))
        ]
    counts = layouts.counts_of_prefix(layout.rank_prefix_matrix)
    assert counts == [one.sum(0).tolist() for one in in_rank]


@given(presences())
@settings(deadline=None)
def test_what_is_sent_comes_back_to_its_token(in_rank: list[torch.Tensor]) -> None:
    for one in in_rank:
        sends = layouts.send_tokens(one)
        zone = [token for tokens in sends for token in tokens.tolist()]
        plan = layouts.reduce_plan(layouts.send_head_of(one), [len(tokens) for tokens in sends])
        for token in range(len(one)):
            mine = plan.slots[plan.row_splits[token] : plan.row_splits[token + 1]].tolist()
            assert [zone[slot] for slot in mine] == [token] * int(one[token].sum())
            assert mine == sorted(mine)


@given(presences(), st.data())
@settings(deadline=None)
def test_surviving_rows_are_the_first_ones(
    in_rank: list[torch.Tensor], data: st.DataObject
) -> None:
    counts = [one.sum(0).tolist() for one in in_rank]
    limits = [data.draw(st.integers(0, 12)) for _ in in_rank]
    kept = layouts.surviving_counts(counts, limits)
    for dst, limit in enumerate(limits):
        rows = [src for src, row in enumerate(counts) for _ in range(row[dst])][:limit]
        assert [row[dst] for row in kept] == [rows.count(src) for src in range(len(counts))]


def test_a_shortened_return_leaves_out_the_last_tokens() -> None:
    head = layouts.send_head_of(torch.tensor([[True], [True], [True]]))
    plan = layouts.reduce_plan(head, [2])
    assert plan.row_splits.tolist() == [0, 1, 2, 2]


def test_contradicting_handles_are_found() -> None:
    with pytest.raises(HandleError):
        layouts.reduce_plan(torch.tensor([[0], [-1]], dtype=torch.int32), [2])


def test_local_selection_and_counts() -> None:
    share = RoutingShare(
        torch.tensor([[True, True], [False, True]]),
        torch.tensor([1, 0, 2, 1], dtype=torch.int32),
        torch.tensor([[0, 2], [3, 2]], dtype=torch.int32),
        torch.tensor([[0.5, 0.25], [0.125, 1.0]]),
    )
    table = RoutingTable.from_shares([share])
    rows = torch.tensor([0, 1])
    mine = layouts.local_selection(table, rows, rank=1, experts_here=2)
    assert mine.topk_idx.tolist() == [[-1, 0], [1, 0]]
    assert mine.topk_weights.tolist() == [[0.0, 0.25], [0.125, 1.0]]
    assert table.topk_weights.tolist() == share.topk_weights.tolist()
    padded = mine.padded(3)
    assert padded.topk_idx.tolist()[2] == [-1, -1]
    assert padded.topk_weights.tolist()[2] == [0.0, 0.0]
    counts = layouts.recv_counts_per_expert(table, rank=1, experts_here=2, alignment=8)
    assert counts == [8, 8]
    assert layouts.recv_counts_per_expert(table, rank=1, experts_here=2, alignment=1) == [2, 1]
