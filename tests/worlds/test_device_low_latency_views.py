"""Low-latency rows that stay where they land, moved by kernels, interpreted.

The tests of the other transports, with the same jobs and the same judge, in small worlds.
"""

from __future__ import annotations

import time

import pytest
import torch

from crossdock import HandleError
from crossdock.cases import ROUTING_CASES
from tests.worlds import test_low_latency_views as world
from tests.worlds.device_worlds import draw
from tests.worlds.low_latency_worlds import (
    combine,
    dispatch,
    form_for,
    format_of,
    noise_for,
    open_buffer,
    run_world,
)

OTHER_WORLDS = [(1, "all_experts"), (2, "duplicates"), (4, "one_rank_empty")]


def go(pool, num_ranks, case, name):
    routing = draw(case, num_ranks)
    form = form_for(routing, name)
    job = (world.go_every_way, routing, form)
    for trips in zip(*run_world(pool, "device", *job, num_ranks=num_ranks), strict=True):
        world.judge(trips, routing, form)


@pytest.mark.parametrize("case", ROUTING_CASES)
def test_rows_stay_where_they_land_and_come_back(interpreted_pool, case):
    name = world.NAMES[list(ROUTING_CASES).index(case) % len(world.NAMES)]
    go(interpreted_pool, 3, case, name)


@pytest.mark.parametrize(("num_ranks", "case"), OTHER_WORLDS)
def test_rows_stay_in_other_worlds(interpreted_pool, num_ranks, case):
    go(interpreted_pool, num_ranks, case, "fp8")


def take_turns(world_of_ranks, transport, routing, form):
    """Slabs while there are views, and combines that take turns with each other."""
    trips, sums = [], []
    with open_buffer(world_of_ranks, transport, **format_of(form)) as buffer:
        for zero_copy in (True, False, True):
            got = dispatch(buffer, routing, form)
            trips.append(world.go_once(buffer, routing, form, use_hook=False, zero_copy=zero_copy))
            sums.append(combine(buffer, noise_for(buffer, got, form, routing), routing, got.handle))
        views, _ = world.start_views(buffer, routing, form)
        late = buffer.get_next_low_latency_views_buffer(views, form.hidden)
        combine(buffer, noise_for(buffer, got, form, routing), routing, got.handle)
        with pytest.raises(HandleError, match="after it was asked for"):
            buffer.low_latency_combine_views(
                late, routing.topk_idxs[buffer.rank], views, zero_copy=True
            )
    return trips, sums


def test_views_and_slabs_take_turns(interpreted_pool):
    routing = draw("uneven", 2)
    form = form_for(routing, "fp8")
    job = (take_turns, routing, form)
    trips, sums = zip(*run_world(interpreted_pool, "device", *job, num_ranks=2), strict=True)
    for each in zip(*trips, strict=True):
        world.judge(each, routing, form)
    for first, *others in sums:
        assert not first.isnan().any()
        assert all(torch.equal(first, other) for other in others)


def read_again(world_of_ranks, transport, routing, form):
    """Where other ranks may still read, nothing is to be written before the next dispatch."""
    topk_idx = routing.topk_idxs[world_of_ranks.rank()]
    with open_buffer(world_of_ranks, transport, **format_of(form)) as buffer:
        both = [world.start_views(buffer, routing, form)[0] for _ in range(2)]
        for views in both:
            rows = buffer.get_next_low_latency_views_buffer(views, form.hidden)
            rows.copy_(world.answer(buffer, views, form))
            buffer.low_latency_combine_views(rows, topk_idx, views, zero_copy=True)
        with pytest.raises(HandleError, match="until the next dispatch"):
            buffer.get_next_low_latency_views_buffer(both[0], form.hidden)
        with pytest.raises(HandleError, match="nobody asked"):
            buffer._low_latency.views_buffer(both[0], form.hidden, make=False)
        views, _ = world.start_views(buffer, routing, form)
        return buffer.get_next_low_latency_views_buffer(views, form.hidden).shape


def test_what_others_read_is_not_written_to(interpreted_pool):
    routing = draw("uniform", 2)
    form = form_for(routing, "fp8")
    found = run_world(interpreted_pool, "device", read_again, routing, form, num_ranks=2)
    assert found == [(2, form.num_slots, form.hidden)] * 2


def run_ahead(world_of_ranks, transport, routing, form):
    """One rank sends two more dispatches while the other one reads the views of the first."""
    topk_idx = routing.topk_idxs[world_of_ranks.rank()]
    with open_buffer(world_of_ranks, transport, timeout_s=60, **format_of(form)) as buffer:
        views, _ = world.start_views(buffer, routing, form)
        tokens = on_cpu(views.tokens)
        buffer.low_latency_combine_views(world.answer(buffer, views, form), topk_idx, views)
        if buffer.rank == 0:
            time.sleep(1.0)
        same = torch.equal(on_cpu(views.tokens), tokens)
        hooks = []
        for nth in (1, 2):
            x = torch.full((len(topk_idx), form.hidden), nth).bfloat16()
            sent = buffer.low_latency_dispatch_views(
                x,
                topk_idx,
                form.num_slots,
                num_experts=routing.num_experts,
                use_fp8=False,
                return_recv_hook=True,
            )
            hooks.append(sent[2])
        for hook in hooks:
            hook()
        return same


def on_cpu(tokens):
    return tokens.view(torch.int16).clone()


def test_views_stay_until_the_next_dispatch(interpreted_pool):
    routing = draw("uniform", 2)
    form = form_for(routing, "bf16")
    assert (
        run_world(interpreted_pool, "device", run_ahead, routing, form, num_ranks=2) == [True] * 2
    )


def test_waits_are_counted(interpreted_pool):
    """In the interpreter in looks, of which nobody knows how long they take."""
    world.judge_waits(interpreted_pool, "device")
