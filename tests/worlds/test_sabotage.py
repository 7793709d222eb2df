"""The comparisons of this folder go red when something is wrong: in the data, or in the machinery.

Every case first shows that nothing is found where nothing was done.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from unittest import mock

import pytest
import torch

from crossdock import Buffer, PeerTimeoutError, ops, reference
from crossdock.cases import ROUTING_CASES, Routing
from crossdock.transports.control import Control, Signal
from tests.worlds.checks import Received, Returned, combine_faults, dispatch_faults
from tests.worlds.test_high_throughput import (
    KINDS,
    count_addends,
    go_once,
    lay_out,
    make_answers,
    open_buffer,
    oracle_dispatch,
    poison,
    poisoned_allocations,
)

KIND_NAME, CULPRIT = "fp8, fp32 scales", 1
KIND = KINDS[KIND_NAME]
ROUTING = ROUTING_CASES["uniform"].make(3, seed=11)


# In the data: what the ranks return is changed before it is compared.


def changed(tensor, change):
    """A copy with its bytes changed: `change` is given them as rows."""
    copy = tensor.contiguous().clone()
    change(copy.view(torch.uint8) if copy.dim() > 1 else copy)
    return copy


def swap_rows(rows):
    rows[[0, 1]] = rows[[1, 0]]


def flip_bit(rows):
    rows[2, -1] ^= 1


def add_one(values):
    values[0] += 1


DATA_SABOTAGE = {
    "two rows swapped": lambda got: got._replace(x=(changed(got.x[0], swap_rows), got.x[1])),
    "one bit of a row": lambda got: got._replace(x=(changed(got.x[0], flip_bit), got.x[1])),
    "two rows' scales swapped": lambda got: got._replace(
        x=(got.x[0], changed(got.x[1], swap_rows))
    ),
    "one bit of a scale": lambda got: got._replace(x=(got.x[0], changed(got.x[1], flip_bit))),
    "scales lost": lambda got: got._replace(x=got.x[0]),
    "scales of another dtype": lambda got: got._replace(x=(got.x[0], got.x[1].double())),
    "a row lost": lambda got: got._replace(x=(got.x[0][:-1], got.x[1][:-1])),
    "one choice": lambda got: got._replace(topk_idx=changed(got.topk_idx, flip_bit)),
    "one weight": lambda got: got._replace(topk_weights=changed(got.topk_weights, flip_bit)),
    "weights lost": lambda got: got._replace(topk_weights=None),
    "one count": lambda got: got._replace(counts=[got.counts[0] + 1, *got.counts[1:]]),
    "one source index": lambda got: got._replace(src_idx=changed(got.src_idx, add_one)),
    "one prefix": lambda got: got._replace(
        rank_prefix_matrix=changed(got.rank_prefix_matrix, flip_bit)
    ),
}


@pytest.mark.parametrize("name", DATA_SABOTAGE)
def test_a_changed_result_of_dispatch_is_found(name):
    right = oracle_dispatch(ROUTING, KIND)
    got = [Received(*each) for each in right]
    assert dispatch_faults(got, right) == []
    got[CULPRIT] = DATA_SABOTAGE[name](got[CULPRIT])
    faults = dispatch_faults(got, right)
    assert faults
    assert all(fault.startswith(f"rank {CULPRIT}: ") for fault in faults)


def sums_in(dtype, num_rows, presence):
    """Combines as the library must not: every addition is rounded to `dtype`."""
    sums = [torch.zeros((len(each), KIND.hidden), dtype=dtype) for each in presence]
    for rank, origins in enumerate(reference.arrivals(presence)):
        rows = make_answers(num_rows[rank], KIND, seed=rank).to(dtype)
        for row, (source, token) in zip(rows, origins, strict=True):
            sums[source][token] += row
    return [Returned(each.to(KIND.answer), None) for each in sums]


def exact_sums():
    right = oracle_dispatch(ROUTING, KIND)
    num_rows = [len(each.recv_src_idx) for each in right]
    answers = [make_answers(num, KIND, seed=rank) for rank, num in enumerate(num_rows)]
    presence = [reference.layout(idx, ROUTING.num_experts, 3)[2] for idx in ROUTING.topk_idxs]
    weights = [each.recv_topk_weights for each in right]
    exact = reference.combine(answers, ROUTING.topk_idxs, ROUTING.num_experts, topk_weights=weights)
    return exact, num_rows, presence


def test_sums_of_too_little_precision_are_found():
    exact, num_rows, presence = exact_sums()
    exact = [each._replace(topk_weights=None) for each in exact]
    addends = count_addends(ROUTING)
    assert combine_faults(sums_in(torch.float32, num_rows, presence), exact, addends) == []
    for dtype in (torch.bfloat16, torch.float16):
        assert combine_faults(sums_in(dtype, num_rows, presence), exact, addends)


def last_place(tensor):
    """One element, one unit in the last place further from zero."""
    copy = tensor.clone()
    copy.view(torch.int16)[3, 5] += 1
    return copy


def with_nan(tensor):
    copy = tensor.clone()
    copy[0, 0] = torch.nan
    return copy


COMBINE_SABOTAGE = {
    "a last place": lambda each: each._replace(x=last_place(each.x)),
    "a NaN": lambda each: each._replace(x=with_nan(each.x)),
    "rows swapped": lambda each: each._replace(x=each.x.flip(0)),
    "a row lost": lambda each: each._replace(x=each.x[:-1]),
    "a weight": lambda each: each._replace(topk_weights=each.topk_weights * (1 + 1e-3)),
    "a weight NaN": lambda each: each._replace(topk_weights=with_nan(each.topk_weights)),
    "weights lost": lambda each: each._replace(topk_weights=None),
}


@pytest.mark.parametrize("name", COMBINE_SABOTAGE)
def test_a_changed_result_of_combine_is_found(name):
    exact, _, _ = exact_sums()
    got = [Returned(each.combined.to(KIND.answer), each.topk_weights.float()) for each in exact]
    assert combine_faults(got, exact, count_addends(ROUTING)) == []
    got[CULPRIT] = COMBINE_SABOTAGE[name](got[CULPRIT])
    faults = combine_faults(got, exact, count_addends(ROUTING))
    assert faults
    assert all(fault.startswith(f"rank {CULPRIT}: ") for fault in faults)


# In the machinery: one rank does its work wrongly, in a real world.


def swap_what_is_sent(rows, tokens, landing):
    SEND(rows, tokens, landing)
    swap_rows(landing.view(torch.uint8))


def corrupt_scales(rows, tokens, landing):
    SEND(rows, tokens, landing)
    if landing.dtype == torch.float32:
        landing[0, 0] += 1


def send_nothing(rows, tokens, landing):
    pass


def send_late(rows, tokens, landing):
    time.sleep(0.1)
    SEND(rows, tokens, landing)


def reduce_in_bf16(rows, row_splits, slots, bias=()):
    num_tokens = len(row_splits) - 1
    sums = torch.zeros((num_tokens, rows.shape[1]), dtype=rows.dtype)
    for token, (begin, end) in enumerate(itertools.pairwise(row_splits.tolist())):
        for slot in slots[begin:end]:
            sums[token] += rows[slot]
    return sums


def wait_for_nothing_to_land(self, signal, call, **rest):
    if signal != Signal.LANDED:
        return WAIT(self, signal, call, **rest)
    return [0] * 3


SEND, WAIT, SIGNAL = ops.send, Control.wait, Control.signal

MACHINERY_SABOTAGE = {
    "swaps two rows": {CULPRIT: [(ops, "send", swap_what_is_sent)]},
    "corrupts a scale": {CULPRIT: [(ops, "send", corrupt_scales)]},
    "sends nothing": {CULPRIT: [(ops, "send", send_nothing)]},
    "adds in low precision": {CULPRIT: [(ops, "reduce", reduce_in_bf16)]},
    "does not wait": {
        CULPRIT: [(ops, "send", send_late)],
        0: [(Control, "wait", wait_for_nothing_to_land)],
    },
}


def go_with_sabotage(group, routing, name):
    with contextlib.ExitStack() as stack:
        for owner, attribute, wrong in MACHINERY_SABOTAGE.get(name, {}).get(group.rank(), []):
            stack.enter_context(mock.patch.object(owner, attribute, wrong))
        buffer = stack.enter_context(open_buffer(group, "one_sided"))
        stack.enter_context(poisoned_allocations())
        buffer.warmup(64, KIND.hidden)
        return go_once(group, buffer, routing, KIND)


def faults_of(results, routing):
    _, got, _, returned = zip(*results, strict=True)
    right = oracle_dispatch(routing, KIND)
    num_rows = [len(each.recv_src_idx) for each in right]
    answers = [make_answers(num, KIND, seed=rank) for rank, num in enumerate(num_rows)]
    exact = reference.combine(answers, routing.topk_idxs, routing.num_experts)
    sums = combine_faults([each[0] for each in returned], exact, count_addends(routing))
    return dispatch_faults(got, right), sums


def test_nothing_is_found_where_nothing_is_wrong(pool):
    results = pool.run(go_with_sabotage, ROUTING, "nothing", num_ranks=3)
    assert faults_of(results, ROUTING) == ([], [])


@pytest.mark.parametrize("name", MACHINERY_SABOTAGE)
def test_a_rank_that_does_its_work_wrongly_is_found(pool, name):
    results = pool.run(go_with_sabotage, ROUTING, name, num_ranks=3)
    received, returned = faults_of(results, ROUTING)
    assert returned if name == "adds in low precision" else received


def test_a_flipped_destination_is_found(pool):
    idxs = [idx.clone() for idx in ROUTING.topk_idxs]
    idxs[CULPRIT][4] = idxs[CULPRIT][4].roll(1) + 1
    idxs[CULPRIT][4] %= ROUTING.num_experts
    flipped = Routing(idxs, ROUTING.num_experts)
    results = pool.run(go_with_sabotage, flipped, "nothing", num_ranks=3)
    assert faults_of(results, flipped) == ([], [])
    received, returned = faults_of(results, ROUTING)
    assert received
    assert returned


def drop_a_signal(group, routing):
    """The culprit never tells rank 0 that its rows have landed."""

    def signal_others(self, signal, call, *, peer=None):
        if (signal, peer) != (Signal.LANDED, 0):
            SIGNAL(self, signal, call, peer=peer)

    wrong = signal_others if group.rank() == CULPRIT else SIGNAL
    with (
        mock.patch.object(Control, "signal", wrong),
        Buffer(group, transport="one_sided", timeout_s=1, first_call_timeout_s=1) as buffer,
    ):
        topk_idx = routing.topk_idxs[group.rank()]
        x = KIND.make(group.rank(), len(topk_idx), KIND.hidden)
        try:
            buffer.dispatch(x, **lay_out(buffer, routing), topk_idx=topk_idx)
        except PeerTimeoutError as error:
            return error.missing
        return None


def test_a_dropped_signal_is_a_timeout_and_not_a_wrong_result(pool):
    results = pool.run(drop_a_signal, ROUTING, num_ranks=3)
    assert results[0] == [CULPRIT]


def test_poison_is_seen(pool):
    assert pool.run(read_poison, num_ranks=2) == [(True, True)] * 2


def read_poison(group):
    """Whether the buffer's and torch's memory are NaN where nothing was written."""
    with open_buffer(group, "one_sided") as buffer, poisoned_allocations():
        buffer.warmup(8, 64)
        poison(group, buffer)
        landing = buffer.get_local_buffer_tensor(torch.bfloat16)
        return bool(landing.isnan().all()), bool(torch.empty(64).isnan().all())
