"""The oracle itself, on examples small enough to be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from crossdock import reference

# Rank 0 owns experts 0 and 1, rank 1 owns 2 and 3: the world of the docstrings.
TOPK_IDXS = [torch.tensor([[0, 2], [1, -1], [3, 3]]), torch.tensor([[2, 0]])]
XS = [torch.tensor([[10.0], [20.0], [30.0]]), torch.tensor([[40.0]])]
WEIGHTS = [torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]), torch.tensor([[0.7, 0.8]])]


def dispatched() -> list[reference.ReferenceDispatch]:
    return reference.dispatch(XS, TOPK_IDXS, WEIGHTS, num_experts=4)


def same(got, expected, dtype):
    """Whether a tensor has exactly these values and this dtype."""
    return got.dtype == dtype and torch.equal(got, torch.tensor(expected, dtype=dtype))


def test_layout_counts_tokens_once_per_rank_and_experts_per_occurrence():
    layout = reference.layout(TOPK_IDXS[0], 4, 2)
    assert same(layout.num_tokens_per_rank, [2, 2], torch.int32)
    assert same(layout.num_tokens_per_expert, [1, 1, 1, 2], torch.int32)
    expected = [[True, True], [True, False], [False, True]]
    assert same(layout.is_token_in_rank, expected, torch.bool)


def test_layout_of_no_tokens():
    layout = reference.layout(torch.empty((0, 2), dtype=torch.int64), 6, 3)
    assert layout.is_token_in_rank.shape == (0, 3)
    assert same(layout.num_tokens_per_rank, [0, 0, 0], torch.int32)
    assert same(layout.num_tokens_per_expert, [0] * 6, torch.int32)


def test_rows_arrive_by_source_rank_then_token():
    presence = [reference.layout(idx, 4, 2).is_token_in_rank for idx in TOPK_IDXS]
    assert reference.arrivals(presence) == [
        [(0, 0), (0, 1), (1, 0)],
        [(0, 0), (0, 2), (1, 0)],
    ]


def test_dispatch():
    first, second = dispatched()
    assert same(first.recv_x, [[10], [20], [40]], torch.float32)
    assert same(first.recv_topk_idx, [[0, -1], [1, -1], [-1, 0]], torch.int64)
    assert same(first.recv_topk_weights, [[0.1, 0], [0.3, 0], [0, 0.8]], torch.float32)
    assert first.num_recv_tokens_per_expert == [2, 1]
    assert same(first.recv_src_idx, [0, 1, 0], torch.int32)
    assert same(second.recv_x, [[10], [30], [40]], torch.float32)
    assert same(second.recv_topk_idx, [[-1, 0], [1, 1], [0, -1]], torch.int64)
    assert same(second.recv_topk_weights, [[0, 0.2], [0.5, 0.6], [0.7, 0]], torch.float32)
    assert second.num_recv_tokens_per_expert == [2, 2]
    assert same(second.recv_src_idx, [0, 2, 0], torch.int32)
    for rank in (first, second):
        assert same(rank.rank_prefix_matrix, [[2, 2], [3, 3]], torch.int32)


def test_counts_are_rounded_up_to_the_alignment():
    aligned = reference.dispatch(XS, TOPK_IDXS, WEIGHTS, num_experts=4, expert_alignment=4)
    assert [each.num_recv_tokens_per_expert for each in aligned] == [[4, 4], [4, 4]]


def test_an_expert_without_tokens_stays_at_zero():
    idxs = [torch.tensor([[0]]), torch.tensor([[0]])]
    aligned = reference.dispatch(
        [x[:1] for x in XS], idxs, None, num_experts=4, expert_alignment=128
    )
    assert [each.num_recv_tokens_per_expert for each in aligned] == [[128, 0], [0, 0]]
    assert aligned[0].recv_topk_weights is None


def test_scales_travel_with_their_rows():
    data = [torch.arange(6, dtype=torch.uint8).view(3, 2), torch.full((1, 2), 9, dtype=torch.uint8)]
    xs = [(d.view(torch.float8_e4m3fn), x) for d, x in zip(data, XS, strict=True)]
    rows, scales = reference.dispatch(xs, TOPK_IDXS, WEIGHTS, num_experts=4)[1].recv_x
    assert same(rows.view(torch.uint8), [[0, 1], [4, 5], [9, 9]], torch.uint8)
    assert same(scales, [[10], [30], [40]], torch.float32)


def test_presence_and_counts_alone_route():
    presence = [reference.layout(idx, 4, 2).is_token_in_rank for idx in TOPK_IDXS]
    counts = [reference.layout(idx, 4, 2).num_tokens_per_expert for idx in TOPK_IDXS]
    routed = reference.dispatch(
        XS, None, num_experts=4, is_token_in_ranks=presence, num_tokens_per_experts=counts
    )
    for got, expected in zip(routed, dispatched(), strict=True):
        assert torch.equal(got.recv_x, expected.recv_x)
        assert torch.equal(got.rank_prefix_matrix, expected.rank_prefix_matrix)
        assert got.num_recv_tokens_per_expert == expected.num_recv_tokens_per_expert
        assert got.recv_topk_idx is None
        assert got.recv_topk_weights is None


def test_presence_decides_what_travels():
    presence = [torch.tensor([[1, 0], [0, 0], [0, 1]]).bool(), torch.tensor([[0, 0]]).bool()]
    first, second = reference.dispatch(
        XS, TOPK_IDXS, WEIGHTS, num_experts=4, is_token_in_ranks=presence
    )
    assert same(first.recv_x, [[10]], torch.float32)
    assert same(second.recv_x, [[30]], torch.float32)
    assert same(second.recv_topk_idx, [[1, 1]], torch.int64)


def test_combine_sums_over_the_ranks_a_token_went_to():
    rows = [each.recv_x for each in dispatched()]
    first, second = reference.combine(rows, TOPK_IDXS, 4)
    assert same(first.combined, [[20], [20], [30]], torch.float64)
    assert same(second.combined, [[80]], torch.float64)
    assert first.topk_weights is None


def test_combine_knows_how_large_its_addends_are():
    rows = [torch.tensor([[10.0], [20.0], [40.0]]), torch.tensor([[-10.0], [30.0], [-40.0]])]
    first, second = reference.combine(rows, TOPK_IDXS, 4)
    assert same(first.combined, [[0], [20], [30]], torch.float64)
    assert same(first.magnitude, [[20], [20], [30]], torch.float64)
    assert same(second.magnitude, [[80]], torch.float64)


def test_weights_come_back_slot_by_slot():
    received = dispatched()
    rows, weights = zip(*((each.recv_x, each.recv_topk_weights) for each in received), strict=True)
    returned = reference.combine(rows, TOPK_IDXS, 4, topk_weights=weights)
    kept = [WEIGHTS[0].double() * torch.tensor([[1, 1], [1, 0], [1, 1]]), WEIGHTS[1].double()]
    for each, expected in zip(returned, kept, strict=True):
        assert torch.equal(each.topk_weights, expected)


@pytest.mark.parametrize("num_biases", [1, 2])
def test_biases_are_added_also_where_nothing_came_back(num_biases):
    idxs = [torch.tensor([[0], [-1]]), torch.tensor([[3]])]
    rows = [torch.tensor([[10.0]]), torch.tensor([[30.0]])]
    biases = [[torch.tensor([[1.0], [-2.0]])] * num_biases, [torch.tensor([[3.0]])] * num_biases]
    first, second = reference.combine(rows, idxs, 4, biases=biases)
    assert same(first.combined, [[10 + num_biases], [-2 * num_biases]], torch.float64)
    assert same(first.magnitude, [[10 + num_biases], [2 * num_biases]], torch.float64)
    assert same(second.combined, [[30 + 3 * num_biases]], torch.float64)


def test_rows_beyond_those_received_are_not_read():
    rows = [torch.cat([each.recv_x, torch.full((2, 1), math.nan)]) for each in dispatched()]
    returned = reference.combine(rows, TOPK_IDXS, 4)
    assert same(returned[0].combined, [[20], [20], [30]], torch.float64)


def test_sums_are_exact_where_float32_is_not():
    idxs = [torch.tensor([[0, 1, 2]])] + [torch.empty((0, 3), dtype=torch.int64)] * 2
    rows = [torch.tensor([[value]]) for value in (1e8, 1.0, -1e8)]
    assert reference.combine(rows, idxs, 3)[0].combined.item() == 1.0


def test_one_rank_gets_its_own_tokens():
    (only,) = reference.dispatch(XS[:1], TOPK_IDXS[:1], WEIGHTS[:1], num_experts=4)
    assert torch.equal(only.recv_x, XS[0])
    assert torch.equal(only.recv_topk_idx, TOPK_IDXS[0])
    assert only.num_recv_tokens_per_expert == [1, 1, 1, 2]


def test_a_flipped_destination_changes_the_answer():
    flipped = [TOPK_IDXS[0].clone(), TOPK_IDXS[1]]
    flipped[0][1, 0] = 2
    first, second = reference.dispatch(XS, flipped, WEIGHTS, num_experts=4)
    assert same(first.recv_x, [[10], [40]], torch.float32)
    assert same(second.recv_x, [[10], [20], [30], [40]], torch.float32)
    assert same(second.rank_prefix_matrix, [[1, 3], [2, 4]], torch.int32)


def test_calc_diff():
    assert reference.calc_diff(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])) == 1 - 2 / 3
    assert reference.calc_diff(XS[0], XS[0]) == 0
    assert reference.calc_diff(XS[0], -XS[0]) == 2
    assert reference.calc_diff(torch.zeros(3), torch.zeros(3)) == 0
    assert reference.calc_diff(torch.empty(0), torch.empty(0)) == 0
    assert reference.calc_diff(torch.zeros(1), torch.ones(1)) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_bound_admits_nan_or_infinity(bad):
    difference = reference.calc_diff(torch.tensor([1.0, bad]), torch.tensor([1.0, 2.0]))
    assert not difference < 1e9
