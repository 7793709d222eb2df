"""High-throughput calls whose rows are moved by kernels, interpreted, against the oracle.

The tests of the other transports, some of them, in small worlds: every routing case, every form of
rows, every way of calling. On GPUs all of those tests run (`tests/gpu`).
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from crossdock import Buffer, Config, CrossdockError, HandleError, reference
from crossdock.cases import ROUTING_CASES, Routing, origin_rows
from crossdock.device import rank_kernels
from tests.worlds import test_high_throughput as world
from tests.worlds.checks import combine_faults, dispatch_faults, row_faults
from tests.worlds.device_worlds import small
from tests.worlds.test_high_throughput import (
    KINDS,
    Kind,
    Returned,
    copied,
    lay_out,
    make_answers,
    make_weights,
    open_buffer,
    plain,
    received,
)

MOST = 19
"""Tokens of a rank: two chunks, five on the way back."""
TURNS = [
    ["bf16 of odd width", "fp8, fp32 scales"],
    ["bf16", "fp16"],
    ["fp8 of odd width", "bf16 of width 1"],
    ["fp32", "fp8, int32 scales"],
]


@pytest.fixture(autouse=True)
def _small_worlds(monkeypatch):
    monkeypatch.setattr(world, "ROUTING_CASES", small(MOST))


def go_there_and_back(pool, monkeypatch, num_ranks, case, names):
    monkeypatch.setattr(world, "KINDS", {name: KINDS[name] for name in names})
    world.test_rows_arrive_and_come_back(pool, "device", num_ranks, case)


@pytest.mark.parametrize("case", ROUTING_CASES)
def test_rows_arrive_and_come_back(interpreted_pool, monkeypatch, case):
    names = TURNS[list(ROUTING_CASES).index(case) % len(TURNS)]
    go_there_and_back(interpreted_pool, monkeypatch, 3, case, names)


@pytest.mark.parametrize(
    ("num_ranks", "case", "turn"),
    [(1, "slots_empty", 0), (1, "nobody", 2), (2, "uneven", 3), (2, "duplicates", 2)],
)
def test_rows_arrive_in_other_worlds(interpreted_pool, monkeypatch, num_ranks, case, turn):
    go_there_and_back(interpreted_pool, monkeypatch, num_ranks, case, TURNS[turn])


def test_rows_arrive_on_four_ranks(interpreted_pool, monkeypatch):
    go_there_and_back(interpreted_pool, monkeypatch, 4, "uneven", ["bf16 of odd width"])


def go_with_knobs(group, routing, config, few_programs):
    """Programs with several chunks each, small ones or large ones."""
    rank, kind = group.rank(), KINDS["bf16"]
    topk_idx = routing.topk_idxs[rank]
    few = mock.patch.object(rank_kernels, "_FEW_PROGRAMS", few_programs)
    with few, open_buffer(group, "device") as buffer, world.poisoned_allocations():
        made = buffer.dispatch(
            kind.make(rank, len(topk_idx), kind.hidden),
            **lay_out(buffer, routing),
            topk_idx=topk_idx,
            topk_weights=make_weights(topk_idx, rank),
            config=config,
        )
        answers = make_answers(len(made[4].recv_src_idx), kind, seed=rank)
        given = (None, make_weights(made[1], 100 + rank))
        back = [buffer.combine(answers, made[4], topk_weights=w, config=config) for w in given]
        return received(*made), [Returned(*each[:2]) for each in back]


@pytest.mark.parametrize(
    ("config", "few_programs", "lengths"),
    [
        (Config(4), 32, (75, 46)),
        (Config(4), 0, (75, 46)),
        (Config(3, num_send_sms=1, tile_bytes=1024), 0, (9, 19, 0)),  # two of three at a time
    ],
)
def test_knobs_change_no_result(interpreted_pool, config, few_programs, lengths):
    generator = torch.Generator().manual_seed(3)
    num_experts = 2 * len(lengths)
    idxs = [torch.randint(-1, num_experts, (length, 2), generator=generator) for length in lengths]
    routing = Routing(idxs, num_experts)
    job = (go_with_knobs, routing, config, few_programs)
    got, returned = zip(*interpreted_pool.run(*job, num_ranks=len(lengths)), strict=True)
    right = world.oracle_dispatch(routing, KINDS["bf16"])
    assert not dispatch_faults(got, right)
    world.check_returned(returned, right, routing, KINDS["bf16"])


@pytest.mark.parametrize(
    ("num_ranks", "case", "kind"),
    [(3, "duplicates", "fp8, fp32 scales"), (3, "nobody", "bf16"), (1, "one_rank_empty", "bf16")],
)
def test_padded_results_begin_like_exact_ones(interpreted_pool, num_ranks, case, kind):
    world.test_padded_results_begin_like_exact_ones(
        interpreted_pool, "device", num_ranks, case, kind
    )


@pytest.mark.parametrize(("num_ranks", "case"), [(2, "all_to_one"), (1, "uniform")])
def test_rows_that_do_not_fit_are_dropped_in_sight(interpreted_pool, num_ranks, case):
    world.test_rows_that_do_not_fit_are_dropped_in_sight(
        interpreted_pool, "device", num_ranks, case
    )


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_biases_are_added_before_the_one_rounding(interpreted_pool, name):
    routing, kind = small(MOST)["tokens_empty"].make(2, seed=5), KINDS[name]
    job = (world.combine_with_biases, "device", routing, name)
    got = interpreted_pool.run(*job, num_ranks=2)
    answers = [
        world.make_answers(len(each.recv_src_idx), kind, seed=rank)
        for rank, each in enumerate(world.oracle_dispatch(routing, kind))
    ]
    for num in (1, 2):
        biases = [world.make_biases(routing, kind, rank)[:num] for rank in range(2)]
        exact = reference.combine(answers, routing.topk_idxs, routing.num_experts, biases=biases)
        returned = [each[num - 1] for each in got]
        assert not combine_faults(returned, exact, world.count_addends(routing, num))


def test_experts_weights_and_alignment_are_optional(interpreted_pool):
    world.test_experts_weights_and_alignment_are_optional(
        interpreted_pool, "device", 2, "duplicates"
    )


def test_presence_decides_what_travels(interpreted_pool):
    world.test_presence_decides_what_travels(interpreted_pool, "device")


def test_strides_and_gradients_do_not_matter(interpreted_pool):
    world.test_strides_and_gradients_do_not_matter(interpreted_pool, "device")


def test_defaults_of_the_caller_do_not_matter(interpreted_pool):
    world.test_defaults_of_the_caller_do_not_matter(interpreted_pool, "device")


GROWING = [(5, 9), (5, 9), (5, 9), (30, 2), (6, 70), (6, 9)]
"""Tokens of two ranks, call by call: only one of them outgrows the buffer, and never the first."""


def dispatch_more_and_more(group, transport, routings):
    """Keeps all results, which outlive the heaps that they came through, and the buffer."""
    kept, rank = [], group.rank()
    with open_buffer(group, transport) as buffer:
        for index, routing in enumerate(routings):
            x = rows_of(rank, index, len(routing.topk_idxs[rank]))
            made = buffer.dispatch(x, **lay_out(buffer, routing))
            kept.append((made[0], buffer.combine(made[0], made[4])[0]))
    return [tuple(map(copied, each)) for each in kept]


def rows_of(rank, index, num_tokens):
    return origin_rows(rank + 2 * index, num_tokens, 16 * (1 + index // 4), dtype=torch.float32)


def test_the_buffer_grows_with_what_is_asked_of_it(interpreted_pool):
    generator = torch.Generator().manual_seed(0)
    routings = []
    for lengths in GROWING:
        idxs = [torch.randint(-1, 4, (length, 2), generator=generator) for length in lengths]
        routings.append(world.Routing(idxs, 4))
    job = (dispatch_more_and_more, "device", routings)
    everything = interpreted_pool.run(*job, num_ranks=2)
    for index, routing in enumerate(routings):
        kind = Kind(16 * (1 + index // 4), plain(torch.float32))
        right = world.oracle_dispatch(routing, kind, offset=2 * index)
        rows, sums = zip(*(each[index] for each in everything), strict=True)
        assert not row_faults(rows, [each.recv_x for each in right])
        for rank, (back, num) in enumerate(zip(sums, world.count_addends(routing), strict=True)):
            x = rows_of(rank, index, len(routing.topk_idxs[rank]))
            assert torch.equal(back, x * num[:, None])


def use_buffers_by_turns(group, transport, routing):
    """Two buffers whose calls alternate, each with calls in flight that the other does not see."""
    rank, kind = group.rank(), KINDS["bf16"]
    with open_buffer(group, transport) as first, open_buffer(group, transport) as second:
        made = []
        for turn, buffer in enumerate((first, second, first)):
            x = kind.make(rank + 20 * turn, len(routing.topk_idxs[rank]), kind.hidden)
            made.append(buffer.dispatch(x, **lay_out(buffer, routing)))
        for buffer, each in zip((second, first), made[1:], strict=True):
            buffer.combine(each[0], each[4])
        return [copied(each[0]) for each in made]


def test_two_buffers_do_not_disturb_each_other(interpreted_pool):
    routing = small(MOST)["uneven"].make(2, seed=1)
    got = interpreted_pool.run(use_buffers_by_turns, "device", routing, num_ranks=2)
    for turn in range(3):
        right = world.oracle_dispatch(routing, KINDS["bf16"], offset=20 * turn)
        assert not row_faults([each[turn] for each in got], [each.recv_x for each in right])


def combine_on_another_buffer(group, routings):
    """A handle whose rows would not fit into the memory of the buffer that is given it."""
    rank = group.rank()
    with open_buffer(group, "device") as large, open_buffer(group, "device") as small:
        made = []
        for buffer, routing in zip((large, small), routings, strict=True):
            x = rows_of(rank, 0, len(routing.topk_idxs[rank]))
            made.append(buffer.dispatch(x, **lay_out(buffer, routing)))
        with pytest.raises(HandleError):
            small.combine(made[0][0], made[0][4])
        return bool(torch.isfinite(large.combine(made[0][0], made[0][4])[0].float()).all())


def test_a_handle_of_a_larger_buffer_is_refused(interpreted_pool):
    routings = [small(most)["uniform"].make(2, seed=1) for most in (40, 4)]
    assert interpreted_pool.run(combine_on_another_buffer, routings, num_ranks=2) == [True, True]


def outgrow_what_is_allowed(group, routings):
    """Only rank 1 has too many tokens; rank 0 has sent its own by then."""
    limits = {"max_buffer_bytes": 200_000, "timeout_s": 30, "first_call_timeout_s": 30}
    with Buffer(group, transport="device", **limits) as buffer:
        return [error_of(buffer, routing) for routing in routings]


def error_of(buffer, routing):
    x = rows_of(buffer.rank, 0, len(routing.topk_idxs[buffer.rank]))
    try:
        buffer.dispatch(x, **lay_out(buffer, routing))
    except CrossdockError as error:
        return type(error).__name__
    return ""


def test_nobody_goes_on_after_a_dispatch_that_some_could_not_make(interpreted_pool):
    routings = [
        Routing([torch.zeros((num, 1), dtype=torch.int64) for num in tokens], 2)
        for tokens in [(4, 4), (4, 2000), (4, 4)]
    ]
    told = interpreted_pool.run(outgrow_what_is_allowed, routings, num_ranks=2)
    assert told == [["", "BufferTooSmallError", "TransportError"]] * 2
