"""The comparisons of the low-latency tests go red when something is wrong.

First a result is changed that was right; then one rank does its work wrongly, in a real world. That
unwritten memory is poisoned is looked at as well: without it, what is never sent could look right.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from unittest import mock

import pytest
import torch

from crossdock import ops
from crossdock.cases import Routing
from crossdock.transports.control import Control, Signal
from tests.worlds.low_latency_checks import Form, allowed
from tests.worlds.low_latency_worlds import (
    CULPRIT,
    Trip,
    combine,
    dispatch,
    draw,
    form_for,
    go_everywhere,
    go_once,
    judge,
    judge_case,
    open_buffer,
    poison,
    run_world,
    trip_faults,
)

# In the data.

SABOTAGED, FORM = draw("uniform", 3), form_for(draw("uniform", 3), "fp8")


@pytest.fixture(scope="module")
def honest_trips(pool) -> list[Trip]:
    job = (go_everywhere, SABOTAGED, [(FORM, False)])
    trips = [each[0] for each in run_world(pool, "loopback", *job, num_ranks=3)]
    assert faults_of(trips) == []
    return trips


def faults_of(trips):
    return trip_faults(trips, judge_case("uniform", 3, "fp8"), SABOTAGED, FORM)


def changed(tensor: torch.Tensor, change) -> torch.Tensor:
    """A copy with its bytes changed: `change` is given them expert by expert, row by row."""
    copy = tensor.clone()
    change(copy.view(torch.uint8) if copy.dtype == torch.float8_e4m3fn else copy)
    return copy


def swap_rows(rows):
    rows[0, :4] = rows[0, :4].flip(0)


def flip_bit(rows):
    rows[1, 0, -1] = rows[1, 0, -1] ^ 1


def drop_row(rows):
    rows[2, :-1] = rows[2, 1:].clone()


def count_up(values):
    values[(0,) * values.dim()] += 1


def replaced(handle, index, value):
    parts = list(handle)
    parts[index] = value
    return tuple(parts)


def with_rows(change):
    return lambda got: got._replace(x=(changed(got.x[0], change), got.x[1]))


def with_scales(change):
    return lambda got: got._replace(x=(got.x[0], changed(got.x[1], change)))


def with_handle(index, change=count_up):
    return lambda got: got._replace(
        handle=replaced(got.handle, index, changed(got.handle[index], change))
    )


SLAB_SABOTAGE = {
    "rows swapped": with_rows(swap_rows),
    "one bit of a row": with_rows(flip_bit),
    "a row lost": with_rows(drop_row),
    "scales swapped": with_scales(swap_rows),
    "one scale": with_scales(count_up),
    "scales row by row": lambda got: got._replace(x=(got.x[0], got.x[1].contiguous())),
    "scales lost": lambda got: got._replace(x=got.x[0]),
    "scales of another dtype": lambda got: got._replace(x=(got.x[0], got.x[1].double())),
    "one count": lambda got: got._replace(recv_count=changed(got.recv_count, count_up)),
    "counts of another dtype": lambda got: got._replace(recv_count=got.recv_count.long()),
    "one source index": with_handle(0),
    "one count of the ranges": with_handle(1),
    "one begin of the ranges": with_handle(1, lambda ranges: ranges[0, :1].add_(1 << 32)),
    "one count of the handle": with_handle(5),
    "slots of the handle": lambda got: got._replace(handle=replaced(got.handle, 2, 17)),
}


@pytest.mark.parametrize("name", SLAB_SABOTAGE)
def test_a_changed_result_of_dispatch_is_found(honest_trips, name):
    trips = list(honest_trips)
    trips[CULPRIT] = trips[CULPRIT]._replace(slabs=SLAB_SABOTAGE[name](trips[CULPRIT].slabs))
    faults = faults_of(trips)
    assert faults
    assert all(fault.startswith(f"rank {CULPRIT}: ") for fault in faults)


def last_place(sums):
    sums.view(torch.int16)[3, 5] += 1


SUM_SABOTAGE = {
    "a last place": last_place,
    "a NaN": lambda sums: sums[0, :1].fill_(torch.nan),
    "tokens swapped": lambda sums: sums.copy_(sums.flip(0)),
    "a token lost": lambda sums: sums[4].zero_(),
    "a weight": lambda sums: sums[2].mul_(1.01),
}


@pytest.mark.parametrize("field", ["unchanged", "noise"])
@pytest.mark.parametrize("name", SUM_SABOTAGE)
def test_a_changed_result_of_combine_is_found(honest_trips, name, field):
    trips = list(honest_trips)
    sums = changed(getattr(trips[CULPRIT], field), SUM_SABOTAGE[name])
    trips[CULPRIT] = trips[CULPRIT]._replace(**{field: sums})
    faults = faults_of(trips)
    assert faults
    assert all(fault.startswith(f"rank {CULPRIT}: ") for fault in faults)


def test_sums_leave_hardly_a_choice(honest_trips):
    """Nearly always one number alone is right, so that a last place cannot hide."""
    for parts in judge_case("uniform", 3, "fp8").noise:
        low, high = allowed(parts, partials=torch.bfloat16)
        assert (low == high).double().mean() > 0.999


# In the machinery: one rank does its work wrongly, in a real world.


def swap_what_is_sent(rows, tokens, landing):
    SEND(rows, tokens, landing)
    if landing.dtype != torch.float32:
        landing.view(torch.uint8)[[0, 1]] = landing.view(torch.uint8)[[1, 0]]


def swap_scales(rows, tokens, landing):
    SEND(rows, tokens, landing)
    if landing.dtype == torch.float32:
        landing[[0, 1]] = landing[[1, 0]]


def send_nothing(rows, tokens, landing):
    pass


def send_late(rows, tokens, landing):
    time.sleep(0.1)
    SEND(rows, tokens, landing)


def place_too_little(landing, rows, slots, *, out):
    PLACE(landing, rows[1:], slots[1:], out=out)


def sum_without_weights(rows, row_splits, slots, *, weights, dtype):
    return GATHER_REDUCE(rows, row_splits, slots, weights=weights * 0 + 1, dtype=dtype)


def sum_in_bf16(rows, row_splits, slots, *, weights, dtype):
    sums = torch.zeros((len(row_splits) - 1, rows.shape[1]), dtype=dtype)
    for token, (begin, end) in enumerate(itertools.pairwise(row_splits.tolist())):
        for slot, weight in zip(slots[begin:end], weights[begin:end], strict=True):
            sums[token] += (rows[slot].float() * weight).to(dtype)
    return sums


def wait_for_nothing_to_land(self, signal, call, **rest):
    if signal != Signal.LANDED:
        return WAIT(self, signal, call, **rest)
    return [0] * 3


SEND, PLACE, GATHER_REDUCE, WAIT = ops.send, ops.place_rows, ops.gather_reduce, Control.wait

MACHINERY_SABOTAGE = {
    "nothing": {},
    "swaps two rows": {CULPRIT: [(ops, "send", swap_what_is_sent)]},
    "swaps two scales": {CULPRIT: [(ops, "send", swap_scales)]},
    "sends nothing": {CULPRIT: [(ops, "send", send_nothing)]},
    "drops a row": {CULPRIT: [(ops, "place_rows", place_too_little)]},
    "forgets the weights": {CULPRIT: [(ops, "gather_reduce", sum_without_weights)]},
    "adds in low precision": {CULPRIT: [(ops, "gather_reduce", sum_in_bf16)]},
    "does not wait": {
        CULPRIT: [(ops, "send", send_late)],
        0: [(Control, "wait", wait_for_nothing_to_land)],
    },
}


def go_with_sabotage(group, transport, routing, form, name):
    with contextlib.ExitStack() as stack:
        for owner, attribute, wrong in MACHINERY_SABOTAGE[name].get(group.rank(), []):
            stack.enter_context(mock.patch.object(owner, attribute, wrong))
        return go_once(stack.enter_context(open_buffer(group, transport)), routing, form)


@pytest.mark.parametrize("name", MACHINERY_SABOTAGE)
def test_a_rank_that_does_its_work_wrongly_is_found(pool, name):
    job = (go_with_sabotage, SABOTAGED, FORM, name)
    faults = faults_of(run_world(pool, "one_sided", *job, num_ranks=3))
    assert bool(faults) == (name != "nothing")


def test_a_flipped_destination_is_found(pool):
    idxs = [idx.clone() for idx in SABOTAGED.topk_idxs]
    idxs[CULPRIT][4] = (idxs[CULPRIT][4].roll(1) + 1) % SABOTAGED.num_experts
    flipped = Routing(idxs, SABOTAGED.num_experts)
    job = (go_everywhere, flipped, [(FORM, True)])
    trips = [each[0] for each in run_world(pool, "one_sided", *job, num_ranks=3)]
    assert not trip_faults(trips, judge(flipped, FORM), flipped, FORM)
    assert faults_of(trips)


def test_poison_is_seen(pool):
    assert run_world(pool, "one_sided", read_poison, num_ranks=2) == [(True, True, True)] * 2


def read_poison(group, transport):
    """Whether memory is NaN where nothing was written, and whether a call then makes do with it."""
    with open_buffer(group, transport, num_slots=9, hidden=64) as buffer:
        poison(buffer)
        memory = buffer.get_local_buffer_tensor(torch.bfloat16)
        is_poisoned, address = bool(memory.isnan().all()), memory.data_ptr()
        routing = Routing([torch.zeros((9, 1), dtype=torch.int64)] * 2, 2)
        got = dispatch(buffer, routing, Form("bf16", "slab", 9, 64))
        combine(buffer, got.x, routing, got.handle)
        has_stayed = buffer.get_local_buffer_tensor(torch.bfloat16).data_ptr() == address
        return is_poisoned, has_stayed, bool(torch.empty(64).isnan().all())
