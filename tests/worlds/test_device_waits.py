"""What high-throughput calls on a device tell of waits, in the interpreter.

It has no clock and counts polls, and runs the programs of a kernel one after another: what is late
is seen by the first of them that needs it. In a buffer's first round that is the one that measures.
On GPUs the tests of all transports measure microseconds (`tests/gpu`).
"""

from __future__ import annotations

import time

import torch

from tests.worlds.checks import dispatch_faults
from tests.worlds.device_worlds import small
from tests.worlds.test_high_throughput import (
    KINDS,
    lay_out,
    make_weights,
    open_buffer,
    oracle_dispatch,
    received,
)

CALLS = ("dispatch", "cached dispatch", "combine")
NAP_S = 1.5
SLOW = 1
COUNTED = 7
"""What the caller has counted before."""


def measure_waits(group, transport, routing):
    """What each rank adds in a call that one rank is late for: by call, [R] as row of [R, R]."""
    rank, kind = group.rank(), KINDS["bf16"]
    x = kind.make(rank, len(routing.topk_idxs[rank]), kind.hidden)
    with open_buffer(group, transport) as buffer:
        made = buffer.dispatch(x, **lay_out(buffer, routing))
    found = {}
    for call in CALLS:
        with open_buffer(group, transport) as buffer:
            make_all_room(buffer, routing)
            waits = torch.full((3, 3), COUNTED, dtype=torch.int64)
            if rank == SLOW:
                time.sleep(NAP_S)
            if call == "combine":
                buffer.combine(made[0], made[4], combine_wait_recv_cost_stats=waits)
            else:
                given = {"handle": made[4]} if call != "dispatch" else lay_out(buffer, routing)
                buffer.dispatch(x, **given, dispatch_wait_recv_cost_stats=waits)
        found[call] = waits - COUNTED
    return found


def make_all_room(buffer, routing):
    """A heap that no later call outgrows, which would wait for all ranks on its own."""
    from crossdock.device.memory import DeviceCapacity

    buffer.warmup(64, 1536)
    buffer._exchange._engine.memory(DeviceCapacity(experts=routing.num_experts))


def test_the_late_rank_is_the_one_that_is_waited_for(interpreted_pool):
    routing = small(11)["uniform"].make(3, seed=2)
    everything = interpreted_pool.run(measure_waits, "device", routing, num_ranks=3)
    for rank, found in enumerate(everything):
        for call, added in found.items():
            assert not added[torch.arange(3) != rank].any(), "the rows of other ranks are theirs"
            others = [int(added[rank][peer]) for peer in range(3) if peer != SLOW]
            late = int(added[rank][SLOW])
            assert (late > 5 + 2 * max(others)) == (rank != SLOW), f"{rank}, {call}: {added[rank]}"


def count_and_return(group, transport, routing):
    rank, kind = group.rank(), KINDS["fp8, fp32 scales"]
    x = kind.make(rank, len(routing.topk_idxs[rank]), kind.hidden)
    with open_buffer(group, transport) as buffer:
        given = {**lay_out(buffer, routing), "topk_idx": routing.topk_idxs[rank]}
        given["topk_weights"] = make_weights(routing.topk_idxs[rank], rank)
        given["dispatch_wait_recv_cost_stats"] = torch.zeros(3, dtype=torch.int64)
        return received(*buffer.dispatch(x, **given))


def test_what_is_measured_arrives_as_well(interpreted_pool):
    routing = small(11)["uneven"].make(3, seed=2)
    got = interpreted_pool.run(count_and_return, "device", routing, num_ranks=3)
    assert not dispatch_faults(got, oracle_dispatch(routing, KINDS["fp8, fp32 scales"]))
