"""From top-k ids to the routing table, checked by counting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdock.errors import ShapeError
from crossdock.routing import RoutingShare, RoutingTable, ShareShape, dispatch_layout


@st.composite
def selections(draw: st.DrawFn) -> tuple[list[list[int]], int, int]:
    """Any top-k ids: `(topk_idx, num_experts, num_ranks)`, with -1 and duplicates."""
    num_ranks = draw(st.integers(1, 5))
    num_experts = num_ranks * draw(st.integers(1, 4))
    num_topk = draw(st.integers(0, 5))
    row = st.lists(st.integers(-1, num_experts - 1), min_size=num_topk, max_size=num_topk)
    return draw(st.lists(row, max_size=12)), num_experts, num_ranks


@given(selections())
@settings(deadline=None)
def test_layout_counts_what_one_would_count(case: tuple[list[list[int]], int, int]) -> None:
    topk_idx, num_experts, num_ranks = case
    shape = (len(topk_idx), len(topk_idx[0]) if topk_idx else 0)
    found = dispatch_layout(
        torch.tensor(topk_idx, dtype=torch.int64).view(shape), num_experts, num_ranks
    )
    wanted = [{e // (num_experts // num_ranks) for e in row if e >= 0} for row in topk_idx]
    in_rank = [[rank in ranks for rank in range(num_ranks)] for ranks in wanted]
    assert found.is_token_in_rank.tolist() == in_rank
    assert found.num_tokens_per_rank.tolist() == [
        sum(row[rank] for row in in_rank) for rank in range(num_ranks)
    ]
    assert found.num_tokens_per_expert.tolist() == [
        sum(row.count(e) for row in topk_idx) for e in range(num_experts)
    ]
    assert found.num_tokens_per_rank.dtype == found.num_tokens_per_expert.dtype == torch.int32


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(0, 2), (5, 2), (-4, 2)])
def test_experts_must_divide_over_ranks(num_experts: int, num_ranks: int) -> None:
    with pytest.raises(ShapeError, match="num_experts"):
        dispatch_layout(torch.zeros(1, 1, dtype=torch.int64), num_experts, num_ranks)


def test_an_expert_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ShapeError, match="expert 8"):
        dispatch_layout(torch.tensor([[1, 8]]), 8, 2)


@pytest.mark.parametrize("has_topk", [False, True])
@pytest.mark.parametrize("has_weights", [False, True])
def test_a_share_survives_its_journey(has_topk: bool, has_weights: bool) -> None:
    shares = [
        RoutingShare(
            torch.rand(num_tokens, 3) < 0.5,
            torch.randint(0, 9, (6,), dtype=torch.int32),
            torch.randint(-1, 6, (num_tokens, 5), dtype=torch.int32) if has_topk else None,
            torch.rand(num_tokens, 5) if has_topk and has_weights else None,
        )
        for num_tokens in (4, 0, 7)
    ]
    shape = ShareShape(num_topk=5, has_topk=has_topk, has_weights=has_topk and has_weights)
    table = RoutingTable.from_shares(
        [
            RoutingShare.from_bytes(
                share.to_bytes(),
                num_tokens=share.is_token_in_rank.shape[0],
                num_ranks=3,
                num_experts=6,
                shape=shape,
            )
            for share in shares
        ]
    )
    assert table.token_offsets == (0, 4, 4, 11)
    assert torch.equal(table.is_token_in_rank, torch.cat([s.is_token_in_rank for s in shares]))
    assert torch.equal(table.num_tokens_per_expert[2], shares[2].num_tokens_per_expert)
    for name in ("topk_idx", "topk_weights"):
        parts = [getattr(share, name) for share in shares]
        joined = getattr(table, name)
        assert (joined is None) == (parts[0] is None)
        assert joined is None or torch.equal(joined, torch.cat(parts))
