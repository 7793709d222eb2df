"""Low-latency rows that stay where they land: a slot for each token, and back from there."""

from __future__ import annotations

import time
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from crossdock import HandleError, RankMismatchError, ShapeError
from crossdock import reference_low_latency as oracle
from crossdock.cases import ROUTING_CASES
from tests.worlds.checks import difference
from tests.worlds.low_latency_worlds import (
    ARGUMENTS,
    CULPRIT,
    TRANSPORTS,
    WIDTHS,
    all_tokens,
    all_weights,
    draw,
    form_for,
    format_of,
    give_weights,
    make_tokens,
    open_buffer,
    poison,
    run_hook,
    run_world,
)

NAMES = list(WIDTHS)
WAYS = [(False, False), (True, False), (False, True)]
"""By hooks, without a copy."""


class Trip(NamedTuple):
    """What one rank got: the views, what went back by row, and what came back."""

    parts: tuple[torch.Tensor, ...]
    idx: torch.Tensor
    weights: torch.Tensor
    src_idx: torch.Tensor
    answers: torch.Tensor
    combined: torch.Tensor


def start_views(buffer, routing, form, **rest):
    topk_idx = routing.topk_idxs[buffer.rank]
    given = {"topk_weights": give_weights(topk_idx, buffer.rank), **ARGUMENTS[form.name], **rest}
    x = make_tokens(buffer.rank, len(topk_idx), form)
    views, _, hook = buffer.low_latency_dispatch_views(
        x, topk_idx, form.num_slots, num_experts=routing.num_experts, **given
    )
    return views, hook


def answer(buffer, views, form):
    """What the experts of a rank make of its rows: noise; of slots without one, NaN."""
    generator = torch.Generator().manual_seed(2000 + buffer.rank)
    shape = (*views.src_idx.shape, form.hidden)
    noise = torch.randn(shape, generator=generator).bfloat16()
    return noise.masked_fill((views.src_idx < 0)[:, :, None], torch.nan)


def go_once(buffer, routing, form, *, use_hook, zero_copy) -> Trip:
    poison(buffer)
    topk_idx = routing.topk_idxs[buffer.rank]
    views, hook = start_views(buffer, routing, form, return_recv_hook=use_hook)
    run_hook(hook, use_hook=use_hook)
    tokens = views.tokens if isinstance(views.tokens, tuple) else (views.tokens,)
    got = tuple(part.clone() for part in (*tokens, *views[1:4]))
    answers = given = answer(buffer, views, form)
    if zero_copy:
        given = buffer.get_next_low_latency_views_buffer(views, form.hidden)
        given.copy_(answers)
    combined, _, hook = buffer.low_latency_combine_views(
        given, topk_idx, views, return_recv_hook=use_hook, zero_copy=zero_copy
    )
    run_hook(hook, use_hook=use_hook)
    return Trip(got[:-3], *got[-3:], answers, combined)


def go_every_way(world, transport, routing, form) -> list[Trip]:
    with open_buffer(world, transport, **format_of(form)) as buffer:
        return [
            go_once(buffer, routing, form, use_hook=use_hook, zero_copy=zero_copy)
            for use_hook, zero_copy in WAYS
        ]


def view_faults(trip, rank, routing, form) -> list[str]:
    """What is wrong with the views of a rank."""
    num_ranks = len(routing.topk_idxs)
    here = routing.num_experts // num_ranks
    faults = []
    for src, (x, weights) in enumerate(
        zip(all_tokens(routing, form), all_weights(routing), strict=True)
    ):
        local = routing.topk_idxs[src] - rank * here
        chosen = (local >= 0) & (local < here)
        token = chosen.any(1).nonzero().flatten()
        src_idx = torch.full((form.num_slots,), -1).int()
        src_idx[token] = token.int()
        idx = torch.full((form.num_slots, local.shape[1]), -1)
        idx[token] = local.masked_fill(~chosen, -1)[token]
        encoded = oracle.encode(x, form.name)
        wanted = [
            ("where rows are", trip.src_idx[src], src_idx),
            ("choices", trip.idx[src], idx),
            ("weights", trip.weights[src][idx >= 0], weights[chosen]),
        ]
        for got, right in zip(
            trip.parts, encoded if isinstance(encoded, tuple) else (encoded,), strict=True
        ):
            wanted.append(("rows", bits(got[src][token]), bits(right[token])))
        for what, got, right in wanted:
            why = difference(got, right)
            if why:
                faults.append(f"rank {rank}, {what} of {src}: {why}")
    return faults


def bits(rows):
    """Rows of which no two are equal unless all their bytes are."""
    return rows.contiguous().view(torch.uint8)


def right_sums(trips, rank):
    """What must come back to a rank: the sum of all ranks' answers, in rank order."""
    total = torch.zeros(trips[rank].combined.shape)
    for trip in trips:
        there = trip.src_idx[rank][: len(total)] >= 0
        total[there] += trip.answers[rank][: len(total)][there].float()
    return total.bfloat16()


def judge(trips, routing, form):
    for rank, trip in enumerate(trips):
        assert not view_faults(trip, rank, routing, form)
        assert torch.equal(trip.combined, right_sums(trips, rank))


@pytest.mark.parametrize("case", ROUTING_CASES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_rows_stay_where_they_land_and_come_back(pool, transport, case):
    routing = draw(case, 4)
    form = form_for(routing, NAMES[list(ROUTING_CASES).index(case) % len(NAMES)])
    for trips in zip(*run_world(pool, transport, go_every_way, routing, form), strict=True):
        judge(trips, routing, form)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_all_formats_stay(pool, name):
    routing = draw("uniform", 2)
    form = form_for(routing, name)
    job = (go_every_way, routing, form)
    for trips in zip(*run_world(pool, "one_sided", *job, num_ranks=2), strict=True):
        judge(trips, routing, form)


def go_without_weights(world, transport, routing, form):
    with open_buffer(world, transport, **format_of(form)) as buffer:
        return start_views(buffer, routing, form, topk_weights=None)[0].topk_weights


def test_weights_come_where_they_are_given(pool):
    routing = draw("uneven", 4)
    form = form_for(routing, "bf16")
    assert run_world(pool, "one_sided", go_without_weights, routing, form) == [None] * 4


def refuse_others(world, transport, routing, form):
    """Combines that cannot be: of views of nobody, of other shapes, of what was not received."""
    topk_idx = routing.topk_idxs[world.rank()]
    with open_buffer(world, transport, **format_of(form)) as buffer:
        views, _ = start_views(buffer, routing, form, return_recv_hook=True)
        x = torch.zeros((*views.src_idx.shape, form.hidden)).bfloat16()
        with pytest.raises(HandleError, match="run its hook"):
            buffer.low_latency_combine_views(x, topk_idx, views)
    with open_buffer(world, transport, **format_of(form)) as buffer:
        views, _ = start_views(buffer, routing, form)
        with pytest.raises(ShapeError, match="x"):
            buffer.low_latency_combine_views(x[:, 1:], topk_idx, views)
    with (
        open_buffer(world, transport, **format_of(form)) as buffer,
        pytest.raises(HandleError, match="not one that this buffer returned"),
    ):
        buffer.low_latency_combine_views(x, topk_idx, views)
    with open_buffer(world, transport, **format_of(form)) as buffer:
        views, _ = start_views(buffer, routing, form)
        with pytest.raises(HandleError, match="nobody asked"):
            buffer.low_latency_combine_views(x, topk_idx, views, zero_copy=True)


@pytest.mark.parametrize("transport", ["one_sided", "collective"])
def test_combines_that_cannot_be_are_refused(pool, transport):
    routing = draw("uniform", 2)
    run_world(pool, transport, refuse_others, routing, form_for(routing, "fp8"), num_ranks=2)


def differ(world, transport, routing, form):
    with open_buffer(world, transport, **format_of(form)) as buffer:
        topk_idx = routing.topk_idxs[buffer.rank]
        x = make_tokens(buffer.rank, len(topk_idx), form)
        given = (x, topk_idx, form.num_slots)
        calls = [buffer.low_latency_dispatch_views, buffer.low_latency_dispatch]
        with pytest.raises(RankMismatchError):
            calls[buffer.rank](*given, num_experts=routing.num_experts)


def test_views_here_and_slabs_there_is_a_mismatch(pool):
    routing = draw("uniform", 2)
    run_world(pool, "one_sided", differ, routing, form_for(routing, "fp8"), num_ranks=2)


def count_waits(world, transport, routing, form):
    """What both calls add to the statistics of a rank, of which one comes late."""
    topk_idx, spent = routing.topk_idxs[world.rank()], torch.zeros(2, world.size()).long()
    with open_buffer(world, transport, **format_of(form)) as buffer:
        start_views(buffer, routing, form)  # what compiles is over before
        dist.barrier(group=world)
        if buffer.rank == CULPRIT:
            time.sleep(0.5)
        views, _ = start_views(buffer, routing, form, dispatch_wait_recv_cost_stats=spent[0])
        x = answer(buffer, views, form)
        dist.barrier(group=world)
        if buffer.rank == CULPRIT:
            time.sleep(0.5)
        buffer.low_latency_combine_views(x, topk_idx, views, combine_wait_recv_cost_stats=spent[1])
        return spent


def judge_waits(pool, transport):
    routing = draw("uniform", 2)
    job = (count_waits, routing, form_for(routing, "fp8"))
    spent = run_world(pool, transport, *job, num_ranks=2)
    assert (spent[1 - CULPRIT][:, CULPRIT] > 0).all()
    return spent


@pytest.mark.parametrize("transport", ["one_sided", "collective"])
def test_waits_are_counted(pool, transport):
    spent = judge_waits(pool, transport)
    assert (spent[1 - CULPRIT][:, CULPRIT] > 200_000).all()
