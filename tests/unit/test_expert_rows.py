"""Expert slabs: where rows lie and which are summed, checked against the definition in words."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdock import layouts
from crossdock.errors import HandleError
from crossdock.layouts import ExpertRows
from crossdock.routing import Selection, SelectionTable

Choices = list[list[list[int]]]


@st.composite
def worlds_of_choices(draw: st.DrawFn) -> tuple[Choices, int, int]:
    """The choices of every rank, local experts and top-k; -1 and duplicates included."""
    num_ranks, experts_here = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    num_topk = draw(st.integers(1, 4))
    row = st.lists(
        st.integers(-1, num_ranks * experts_here - 1), min_size=num_topk, max_size=num_topk
    )
    return [draw(st.lists(row, max_size=5)) for _ in range(num_ranks)], experts_here, num_topk


def table_of(choices: Choices, num_topk: int) -> SelectionTable:
    selections = []
    for rank, rows in enumerate(choices):
        idx = torch.tensor(rows, dtype=torch.int32).view(-1, num_topk)
        slots = torch.arange(idx.numel(), dtype=torch.float32).view_as(idx)
        selections.append(Selection(idx, 1 + slots + 100 * rank))
    return SelectionTable.of(selections)


def wanted_rows(choices: Choices, rank: int, experts_here: int) -> list[tuple[int, int, int]]:
    """(local expert, source rank, token) of every row, in order."""
    return [
        (expert, source, token)
        for expert in range(experts_here)
        for source, rows in enumerate(choices)
        for token, row in enumerate(rows)
        if rank * experts_here + expert in row
    ]


@given(worlds_of_choices())
@settings(deadline=None)
def test_rows_are_by_expert_then_source_then_token(world: tuple[Choices, int, int]) -> None:
    choices, experts_here, num_topk = world
    table = table_of(choices, num_topk)
    for rank in range(len(choices)):
        local = table.local(rank, experts_here)
        rows = layouts.expert_rows(local, table, experts_here)
        wanted = wanted_rows(choices, rank, experts_here)
        found = torch.stack([rows.experts, rows.sources, rows.tokens], 1).tolist()
        assert found == [list(each) for each in wanted]
        assert rows.slots(0).tolist() == list(range(len(wanted)))
        ranges = rows.layout_range.tolist()
        for number, (expert, source, _) in enumerate(wanted):
            begin, count = ranges[expert][source] >> 32, ranges[expert][source] & 0xFFFFFFFF
            before = sum(each[0] < expert for each in wanted)
            here = [n for n, each in enumerate(wanted) if each[:2] == (expert, source)]
            assert begin == here[0] - before
            assert count == len(here)
            assert rows.slots(50)[number] == expert * 50 + number - before
        assert rows.recv_count.tolist() == [
            sum(each[0] == expert for each in wanted) for expert in range(experts_here)
        ]


@given(worlds_of_choices())
@settings(deadline=None)
def test_a_token_arrives_as_one_of_what_its_source_sends(world: tuple[Choices, int, int]) -> None:
    choices, experts_here, num_topk = world
    table = table_of(choices, num_topk)
    for rank in range(len(choices)):
        local = table.local(rank, experts_here)
        arrivals = layouts.arrivals(local, table)
        for source, rows in enumerate(choices):
            sent = [
                token
                for token, row in enumerate(rows)
                if any(e >= 0 and e // experts_here == rank for e in row)
            ]
            for number, token in enumerate(sent):
                at = table.row_of(torch.tensor([source]), torch.tensor([token]))
                assert arrivals[at].item() == number


@given(worlds_of_choices(), st.booleans())
@settings(deadline=None)
def test_partial_sums_name_the_rows_of_each_token(
    world: tuple[Choices, int, int], compact: bool
) -> None:
    choices, experts_here, num_topk = world
    table = table_of(choices, num_topk)
    for rank in range(len(choices)):
        local = table.local(rank, experts_here)
        rows = layouts.expert_rows(local, table, experts_here)
        slots = rows.slots(0 if compact else 50)
        plan = layouts.partial_sums(rows, slots, local, table=table)
        lies = {
            each: int(slot)
            for each, slot in zip(wanted_rows(choices, rank, experts_here), slots, strict=True)
        }
        wanted, sources = [], []
        for source, tokens in enumerate(choices):
            for token, row in enumerate(tokens):
                terms = [
                    (lies[e - rank * experts_here, source, token], 1 + token * num_topk + k)
                    for k, e in enumerate(row)
                    if e >= 0 and e // experts_here == rank
                ]
                if terms:
                    wanted.append([(slot, weight + 100 * source) for slot, weight in terms])
                    sources.append(source)
        splits = plan.row_splits.tolist()
        found = [
            list(zip(plan.slots[b:e].tolist(), plan.weights[b:e].tolist(), strict=True))
            for b, e in pairwise(splits)
        ]
        assert found == wanted
        assert plan.num_back == [sources.count(source) for source in range(len(choices))]


@given(worlds_of_choices(), st.booleans())
@settings(deadline=None)
def test_a_handle_gives_the_layout_back(world: tuple[Choices, int, int], compact: bool) -> None:
    choices, experts_here, num_topk = world
    table = table_of(choices, num_topk)
    rows = layouts.expert_rows(table.local(0, experts_here), table, experts_here)
    shape = (60,) if compact else (experts_here, 20)
    src_info = torch.full(shape, -1, dtype=torch.int32)
    src_info.view(-1)[rows.slots(0 if compact else 20)] = rows.tokens.int()
    again = ExpertRows.of_handle(rows.layout_range, src_info, compact=compact)
    for name in ("counts", "experts", "sources", "tokens"):
        assert torch.equal(getattr(again, name), getattr(rows, name)), name


def test_rows_that_never_came_are_left_out_of_the_sum() -> None:
    table = table_of([[[0, 1]], [[1, 0]]], 2)
    rows = layouts.expert_rows(table.without({1}).local(0, 2), table, 2)
    plan = layouts.partial_sums(rows, rows.slots(0), table.local(0, 2), table=table)
    assert plan.row_splits.tolist() == [0, 2, 2]
    assert plan.slots.tolist() == [0, 1]
    assert plan.num_back == [1, 1]


def test_sums_need_weights() -> None:
    table = SelectionTable.of([Selection(torch.zeros((1, 1), dtype=torch.int32))])
    local = table.local(0, 1)
    rows = layouts.expert_rows(local, table, 1)
    with pytest.raises(HandleError, match="weights"):
        layouts.partial_sums(rows, rows.slots(0), local, table=table)


@given(worlds_of_choices(), st.booleans())
@settings(deadline=None)
def test_shares_survive_the_wire(world: tuple[Choices, int, int], has_weights: bool) -> None:
    choices, _, num_topk = world
    for rows in choices:
        idx = torch.tensor(rows, dtype=torch.int32).view(-1, num_topk)
        sent = Selection(idx, torch.rand(idx.shape) if has_weights else None)
        raw = sent.to_bytes()
        assert raw.numel() == sent.num_bytes
        got = Selection.from_bytes(
            raw, num_tokens=len(rows), num_topk=num_topk, has_weights=has_weights
        )
        assert torch.equal(got.topk_idx, idx)
        assert (got.topk_weights is None) == (not has_weights)
        if has_weights:
            assert torch.equal(got.topk_weights, sent.topk_weights)


def test_ranks_that_are_gone_have_chosen_nothing() -> None:
    table = table_of([[[0, 1]], [[1, 0], [2, 3]], [[3, -1]]], 2)
    assert table.without(()) is table
    left = table.without({0, 1})
    assert left.topk_idx.tolist() == [[-1, -1]] * 3 + [[3, -1]]
    assert left.src_token.tolist() == [0, 0, 1, 0]
    assert table.local(1, 2).tolist() == [[-1, -1], [-1, -1], [0, 1], [1, -1]]
