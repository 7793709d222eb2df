"""Rows that stay where they land: dispatched into slots of each source, and combined from there."""

from __future__ import annotations

import pytest
import torch

from crossdock import HandleError, ShapeError, reference
from crossdock.cases import ROUTING_CASES
from tests.worlds.checks import Received, Returned, combine_faults, dispatch_faults
from tests.worlds.device_worlds import small
from tests.worlds.test_high_throughput import (
    KINDS,
    TRANSPORTS,
    copied,
    count_addends,
    lay_out,
    make_answers,
    make_biases,
    make_weights,
    open_buffer,
    oracle_dispatch,
    poison,
    poisoned_allocations,
)

MOST = 19
"""Tokens of a rank: two chunks, five on the way back."""
NUM_SLOTS = 21


def go_through_views(group, transport, routing, name):
    """There and back twice, through the same memory: the first time without choices."""
    kind = KINDS[name]
    with open_buffer(group, transport) as buffer, poisoned_allocations():
        go_once(buffer, routing, kind, offset=40)
        poison(group, buffer)
        return go_once(buffer, routing, kind, choices=True)


def go_once(buffer, routing, kind, *, offset=0, choices=False):
    rank, topk_idx = buffer.rank, routing.topk_idxs[buffer.rank]
    given = lay_out(buffer, routing)
    given = {name: given[name] for name in ("is_token_in_rank", "num_tokens_per_expert")}
    if choices:
        given |= {"topk_idx": topk_idx, "topk_weights": make_weights(topk_idx, rank)}
    x = kind.make(rank + offset, len(topk_idx), kind.hidden)
    views, _ = buffer.dispatch_views(x, NUM_SLOTS, **given)
    got = packed(views, num_local=routing.num_experts // buffer.group_size)
    is_row = torch.arange(NUM_SLOTS) < views.num_rows[:, None]
    answers = torch.full((*is_row.shape, kind.hidden), float("nan"), dtype=kind.answer)
    answers[is_row] = make_answers(len(got.src_idx), kind, seed=rank)
    bias = make_biases(routing, kind, rank)
    weights = None if views.topk_weights is None else views.topk_weights.clone()
    returned = buffer.combine(answers, views.handle, topk_weights=weights, bias=bias)
    return got, Returned(*returned[:2])


def packed(views, *, num_local):
    """What views show, without the gaps; a caller may rely on no choice being made in those."""
    num_rows = views.num_rows.tolist()

    def pack(slots):
        return torch.cat([slots[rank, :num] for rank, num in enumerate(num_rows)])

    rows = views.tokens
    rows = tuple(map(pack, rows)) if isinstance(rows, tuple) else pack(rows)
    idx, weights, counts = views.topk_idx, views.topk_weights, []
    if idx is not None and weights is not None:
        for rank, num in enumerate(num_rows):
            assert (idx[rank, num:] == -1).all()
            assert not weights[rank, num:].any()
        idx, weights = pack(idx), pack(weights)
        counts = torch.bincount(idx[idx >= 0], minlength=num_local).tolist()
    handle = views.handle
    return Received(
        copied(rows), idx, weights, counts, handle.rank_prefix_matrix, pack(handle.recv_src_idx)
    )


def judge(pool, transport, routing, name):
    num_ranks, kind = len(routing.topk_idxs), KINDS[name]
    job = (go_through_views, transport, routing, name)
    got, returned = zip(*pool.run(*job, num_ranks=num_ranks), strict=True)
    right = oracle_dispatch(routing, kind)
    assert not dispatch_faults(got, right)
    answers = [make_answers(len(each.recv_src_idx), kind, seed=r) for r, each in enumerate(right)]
    exact = reference.combine(
        answers,
        routing.topk_idxs,
        routing.num_experts,
        topk_weights=[each.recv_topk_weights for each in right],
        biases=[make_biases(routing, kind, rank) for rank in range(num_ranks)],
    )
    assert not combine_faults(returned, exact, count_addends(routing, 2))


@pytest.mark.parametrize("name", ["bf16 of odd width", "fp8, fp32 scales", "fp32"])
@pytest.mark.parametrize("case", ["uneven", "slots_empty", "nobody"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_views_hold_what_a_dispatch_brings(pool, transport, case, name):
    judge(pool, transport, small(MOST)[case].make(3, seed=3), name)


@pytest.mark.parametrize("name", ["bf16", "fp8 of odd width"])
@pytest.mark.parametrize("case", ROUTING_CASES)
def test_kernels_leave_rows_where_they_land(interpreted_pool, case, name):
    num_ranks = 2 if name == "bf16" else 3
    judge(interpreted_pool, "device", small(MOST)[case].make(num_ranks, seed=3), name)


def misuse_views(group, transport, routing):
    kind, faults = KINDS["bf16"], []
    with open_buffer(group, transport) as buffer:
        given = lay_out(buffer, routing)
        given = {name: given[name] for name in ("is_token_in_rank", "num_tokens_per_expert")}
        x = kind.make(buffer.rank, len(routing.topk_idxs[buffer.rank]), kind.hidden)
        views, _ = buffer.dispatch_views(x, NUM_SLOTS, **given)
        answers = torch.zeros((1, NUM_SLOTS, kind.hidden), dtype=kind.answer)
        for error, call in (
            (ShapeError, lambda: buffer.dispatch_views(x, len(x) - 1, **given)),
            (ShapeError, lambda: buffer.combine(answers[:, 1:], views.handle)),
            (ShapeError, lambda: buffer.combine(answers[0], views.handle)),
            (HandleError, lambda: buffer.dispatch(x, handle=views.handle)),
        ):
            with pytest.raises(error) as raised:
                call()
            faults.append(str(raised.value))
    return faults


def test_views_are_not_mistaken_for_rows(pool):
    routing = small(MOST)["uniform"].make(1, seed=0)
    (told,) = pool.run(misuse_views, "one_sided", routing, num_ranks=1)
    assert "num_max_tokens_per_rank" in told[0]
    assert all(text.startswith("x:") or "x" in text for text in told[1:3])
    assert "views" in told[3]
