"""Dispatch and combine in real processes, against the oracle: every transport, case and format.

A job holds everything that the ranks of a test do, in one world; what they return is compared here.
Memory is poisoned first: the buffer with bytes that are NaN in every floating format, and whatever
torch allocates uninitialised, which it fills with NaN in deterministic mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from crossdock import Buffer, UnsupportedError, reference
from crossdock.cases import ROUTING_CASES, Routing, choose, origin_rows, origin_rows_fp8
from tests.worlds.checks import (
    Received,
    Returned,
    combine_faults,
    difference,
    dispatch_faults,
    row_faults,
)

TRANSPORTS = ["one_sided", "collective"]
POISON = 0xFF


@dataclass(frozen=True)
class Kind:
    """A form in which rows are dispatched, and the dtype of the experts' answers."""

    hidden: int
    make: Callable[[int, int, int], torch.Tensor | tuple[torch.Tensor, torch.Tensor]]
    answer: torch.dtype = torch.bfloat16


def plain(dtype: torch.dtype) -> Callable[[int, int, int], torch.Tensor]:
    return lambda rank, num_tokens, hidden: origin_rows(rank, num_tokens, hidden, dtype=dtype)


def column_major_scales(rank: int, num_tokens: int, hidden: int):
    data, scales = origin_rows_fp8(rank, num_tokens, hidden, scale_dtype=torch.float32)
    return data, scales.t().contiguous().t()


def padded_scales(rank: int, num_tokens: int, hidden: int):
    """Packed scales as every second column of a wider tensor, and only every fourth of them."""
    data, scales = origin_rows_fp8(rank, num_tokens, hidden, scale_dtype=torch.int32)
    packed = scales[:, ::4]
    wider = torch.full((num_tokens, 2 * packed.shape[1]), -1, dtype=torch.int32)
    wider[:, ::2] = packed
    return data, wider[:, ::2]


KINDS = {
    "bf16": Kind(136, plain(torch.bfloat16)),
    "bf16 of odd width": Kind(7, plain(torch.bfloat16)),
    "bf16 of width 1": Kind(1, plain(torch.bfloat16)),
    "fp16": Kind(67, plain(torch.float16), torch.float16),
    "fp32": Kind(33, plain(torch.float32), torch.float32),
    "fp8, fp32 scales": Kind(384, column_major_scales),
    "fp8, int32 scales": Kind(1536, padded_scales),
    "fp8 of odd width": Kind(131, column_major_scales),
}


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fills what torch allocates without a value with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def poison(group: dist.ProcessGroup, buffer: Buffer) -> None:
    """Overwrites the memory rows land in. Nobody may be in a call, or hold results in it."""
    dist.barrier(group=group)
    with contextlib.suppress(UnsupportedError):
        buffer.get_local_buffer_tensor(torch.uint8).fill_(POISON)
    dist.barrier(group=group)


def open_buffer(group: dist.ProcessGroup, transport: str) -> Buffer:
    return Buffer(group, transport=transport, timeout_s=30, first_call_timeout_s=30)


def make_weights(topk_idx: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(topk_idx.shape, generator=generator)


def make_answers(num_rows: int, kind: Kind, *, seed: int) -> torch.Tensor:
    """What the experts of a rank answer: noise, so that no sum is right by chance."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn((num_rows, kind.hidden), generator=generator).to(kind.answer)


def lay_out(buffer: Buffer, routing: Routing) -> dict:
    """The arguments of `dispatch` that `get_dispatch_layout` makes."""
    per_rank, per_host, per_expert, in_rank, _ = buffer.get_dispatch_layout(
        routing.topk_idxs[buffer.rank], routing.num_experts
    )
    return {
        "num_tokens_per_rank": per_rank,
        "num_tokens_per_rdma_rank": per_host,
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
    }


def copied(x):
    return tuple(part.clone() for part in x) if isinstance(x, tuple) else x.clone()


def received(x, topk_idx, topk_weights, counts, handle, _) -> Received:
    """A dispatch's result as it travels home: without memory of the buffer."""
    return Received(copied(x), topk_idx, topk_weights, counts, handle[0], handle[3])


def go_there_and_back(group, transport, routing, kinds):
    with open_buffer(group, transport) as buffer, poisoned_allocations():
        buffer.warmup(64, 1536, torch.float32)
        return [go_once(group, buffer, routing, KINDS[kind]) for kind in kinds]


def go_once(group, buffer, routing, kind):
    poison(group, buffer)
    rank, topk_idx = buffer.rank, routing.topk_idxs[buffer.rank]
    layout = lay_out(buffer, routing)
    x = kind.make(rank, len(topk_idx), kind.hidden)
    weights = make_weights(topk_idx, rank)
    first = buffer.dispatch(x, **layout, topk_idx=topk_idx, topk_weights=weights)
    got = received(*first)
    bare = tuple(part.clone() for part in first[4])
    again = buffer.dispatch(kind.make(rank + 50, len(topk_idx), kind.hidden), handle=bare)
    got_again = copied(again[0])
    assert again[1:5] == (None, None, None, None)
    num_rows = len(first[4].recv_src_idx)
    answers = make_answers(num_rows, kind, seed=rank)
    returned = [
        buffer.combine(answers, handle, topk_weights=given)[:2]
        for handle, given in ((first[4], None), (bare, make_weights(first[1], 100 + rank)))
    ]
    return layout, got, got_again, [Returned(*each) for each in returned]


def check_layouts(layouts, routing):
    for rank, layout in enumerate(layouts):
        right = reference.layout(routing.topk_idxs[rank], routing.num_experts, len(layouts))
        for name, tensor in right._asdict().items():
            assert not difference(layout[name], tensor), name
        assert layout["num_tokens_per_rdma_rank"] is None


def oracle_dispatch(routing, kind, *, offset=0, **rest):
    ranks = range(len(routing.topk_idxs))
    xs = [kind.make(rank + offset, len(routing.topk_idxs[rank]), kind.hidden) for rank in ranks]
    weights = [make_weights(routing.topk_idxs[rank], rank) for rank in ranks]
    rest.setdefault("num_experts", routing.num_experts)
    return reference.dispatch(xs, routing.topk_idxs, weights, **rest)


def count_addends(routing, num_biases=0):
    layouts = [
        reference.layout(idx, routing.num_experts, len(routing.topk_idxs))
        for idx in routing.topk_idxs
    ]
    return [layout.is_token_in_rank.sum(1) + num_biases for layout in layouts]


@pytest.mark.parametrize("case", ROUTING_CASES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_rows_arrive_and_come_back(pool, transport, num_ranks, case):
    routing = ROUTING_CASES[case].make(num_ranks, seed=num_ranks)
    everything = pool.run(go_there_and_back, transport, routing, list(KINDS), num_ranks=num_ranks)
    for index, (name, kind) in enumerate(KINDS.items()):
        layouts, got, again, returned = zip(*(each[index] for each in everything), strict=True)
        check_layouts(layouts, routing)
        right = oracle_dispatch(routing, kind)
        assert not dispatch_faults(got, right), name
        right_again = oracle_dispatch(routing, kind, offset=50)
        assert not row_faults(again, [each.recv_x for each in right_again]), name
        check_returned(returned, right, routing, kind)


def check_returned(returned, right, routing, kind):
    """Compares a combine without weights, and one with."""
    num_rows = [len(each.recv_src_idx) for each in right]
    answers = [make_answers(num, kind, seed=rank) for rank, num in enumerate(num_rows)]
    weights = [make_weights(each.recv_topk_idx, 100 + rank) for rank, each in enumerate(right)]
    for index, given in enumerate((None, weights)):
        exact = reference.combine(
            answers, routing.topk_idxs, routing.num_experts, topk_weights=given
        )
        got = [each[index] for each in returned]
        assert {each.x.dtype for each in got} == {kind.answer}
        assert not combine_faults(got, exact, count_addends(routing))


def dispatch_padded(group, transport, routing, kind_name, num_worst_tokens):
    kind, rank = KINDS[kind_name], group.rank()
    topk_idx = routing.topk_idxs[rank]
    with open_buffer(group, transport) as buffer, poisoned_allocations():
        buffer.warmup(64, 1536)
        poison(group, buffer)
        padded = buffer.dispatch(
            kind.make(rank, len(topk_idx), kind.hidden),
            **lay_out(buffer, routing),
            topk_idx=topk_idx,
            topk_weights=make_weights(topk_idx, rank),
            num_worst_tokens=num_worst_tokens,
        )
        x = kind.make(rank + 50, len(topk_idx), kind.hidden)
        again = buffer.dispatch(x, handle=tuple(padded[4]))
        answers = make_answers(num_worst_tokens, kind, seed=rank)
        weights = make_weights(padded[1], 100 + rank)
        num_real = int(padded[4].rank_prefix_matrix[-1, rank])
        answers[num_real:] = weights[num_real:] = torch.nan
        returned = buffer.combine(answers, padded[4], topk_weights=weights)[:2]
        return received(*padded), copied(again[0]), Returned(*returned)


def front(x, num_rows):
    return tuple(part[:num_rows] for part in x) if isinstance(x, tuple) else x[:num_rows]


def cut(each, num_rows, counts):
    """The first rows of what one rank received, and no more counts than a padded call has."""
    rows = (front(part, num_rows) for part in each[:3])
    return Received(*rows, counts, each.rank_prefix_matrix, each.src_idx[:num_rows])


@pytest.mark.parametrize("kind_name", ["bf16", "fp8, fp32 scales"])
@pytest.mark.parametrize("case", ["uneven", "one_rank_empty", "nobody", "duplicates"])
@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_padded_results_begin_like_exact_ones(pool, transport, num_ranks, case, kind_name):
    routing, kind, num_worst = ROUTING_CASES[case].make(num_ranks, seed=8), KINDS[kind_name], 80
    job = (dispatch_padded, transport, routing, kind_name, num_worst)
    got, again, returned = zip(*pool.run(*job, num_ranks=num_ranks), strict=True)
    right = oracle_dispatch(routing, kind)
    num_rows = [len(each.recv_src_idx) for each in right]
    assert [each.counts for each in got] == [[]] * num_ranks
    fronts = [cut(each, num, []) for each, num in zip(got, num_rows, strict=True)]
    wanted = [each._replace(num_recv_tokens_per_expert=[]) for each in right]
    assert not dispatch_faults(fronts, wanted)
    for each, num in zip(got, num_rows, strict=True):
        assert len(each.topk_idx) == len(each.topk_weights) == num_worst
        assert (each.topk_idx[num:] == -1).all()
        assert (each.topk_weights[num:] == 0).all()
        for part in each.x if isinstance(each.x, tuple) else (each.x,):
            assert len(part) == num_worst
            assert (part[num:].contiguous().view(torch.uint8) == 0).all()
    right_again = [each.recv_x for each in oracle_dispatch(routing, kind, offset=50)]
    got_again = [front(x, num) for x, num in zip(again, num_rows, strict=True)]
    assert not row_faults(got_again, right_again)
    answers = [make_answers(num_worst, kind, seed=rank) for rank in range(num_ranks)]
    weights = [make_weights(each.topk_idx, 100 + rank) for rank, each in enumerate(got)]
    exact = reference.combine(answers, routing.topk_idxs, routing.num_experts, topk_weights=weights)
    assert not combine_faults(returned, exact, count_addends(routing))


def survivors(routing, num_worst_tokens):
    """Which tokens still go where, of every rank, when each rank keeps only so many rows."""
    num_ranks = len(routing.topk_idxs)
    presence = [
        reference.layout(idx, routing.num_experts, num_ranks).is_token_in_rank
        for idx in routing.topk_idxs
    ]
    for rank, origins in enumerate(reference.arrivals(presence)):
        for source, token in origins[num_worst_tokens:]:
            presence[source][token, rank] = False
    return presence


@pytest.mark.parametrize("case", ["uniform", "all_to_one", "one_rank_empty"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_rows_that_do_not_fit_are_dropped_in_sight(pool, transport, num_ranks, case):
    routing, kind, num_worst = ROUTING_CASES[case].make(num_ranks, seed=9), KINDS["bf16"], 6
    job = (dispatch_padded, transport, routing, "bf16", num_worst)
    got, again, returned = zip(*pool.run(*job, num_ranks=num_ranks), strict=True)
    right = oracle_dispatch(routing, kind)
    assert any(each.rank_prefix_matrix[-1, rank] > num_worst for rank, each in enumerate(got))
    kept = [min(len(each.recv_src_idx), num_worst) for each in right]
    fronts = [cut(each, num, []) for each, num in zip(got, kept, strict=True)]
    wanted = [cut(Received(*each), num, []) for each, num in zip(right, kept, strict=True)]
    wanted = [reference.ReferenceDispatch(*each) for each in wanted]
    assert not dispatch_faults(fronts, wanted)
    assert {len(each.x) for each in got} == {num_worst}
    right_again = oracle_dispatch(routing, kind, offset=50)
    assert not row_faults(
        [front(x, num) for x, num in zip(again, kept, strict=True)],
        [front(each.recv_x, num) for each, num in zip(right_again, kept, strict=True)],
    )
    presence = survivors(routing, num_worst)
    answers = [make_answers(num_worst, kind, seed=rank) for rank in range(num_ranks)]
    weights = [make_weights(each.topk_idx, 100 + rank) for rank, each in enumerate(got)]
    exact = reference.combine(answers, None, topk_weights=weights, is_token_in_ranks=presence)
    assert not combine_faults(returned, exact, [each.sum(1) for each in presence])


def combine_with_biases(group, transport, routing, kind_name):
    kind, rank = KINDS[kind_name], group.rank()
    with open_buffer(group, transport) as buffer, poisoned_allocations():
        buffer.warmup(64, 1536)
        poison(group, buffer)
        x = kind.make(rank, len(routing.topk_idxs[rank]), kind.hidden)
        handle = buffer.dispatch(x, **lay_out(buffer, routing))[4]
        answers = make_answers(len(handle.recv_src_idx), kind, seed=rank)
        both = make_biases(routing, kind, rank)
        return [
            Returned(*buffer.combine(answers, handle, bias=bias)[:2]) for bias in (both[0], both)
        ]


def make_biases(routing, kind, rank):
    num_tokens = len(routing.topk_idxs[rank])
    return tuple(make_answers(num_tokens, kind, seed=50 + 10 * i + rank) for i in (0, 1))


@pytest.mark.parametrize("kind_name", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("case", ["uneven", "tokens_empty", "nobody"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_biases_are_added_before_the_one_rounding(pool, transport, case, kind_name):
    routing, kind = ROUTING_CASES[case].make(4, seed=5), KINDS[kind_name]
    got = pool.run(combine_with_biases, transport, routing, kind_name)
    answers = [
        make_answers(len(each.recv_src_idx), kind, seed=rank)
        for rank, each in enumerate(oracle_dispatch(routing, kind))
    ]
    for num in (1, 2):
        biases = [make_biases(routing, kind, rank)[:num] for rank in range(4)]
        exact = reference.combine(answers, routing.topk_idxs, routing.num_experts, biases=biases)
        returned = [each[num - 1] for each in got]
        assert not combine_faults(returned, exact, count_addends(routing, num))


def dispatch_in_other_ways(group, transport, routing):
    """Without experts, without weights, and with alignments."""
    kind, rank = KINDS["bf16"], group.rank()
    topk_idx = routing.topk_idxs[rank]
    x, weights = kind.make(rank, len(topk_idx), kind.hidden), make_weights(topk_idx, rank)
    with open_buffer(group, transport) as buffer, poisoned_allocations():
        layout = lay_out(buffer, routing)
        results = [
            buffer.dispatch(x, **layout),
            buffer.dispatch(x, **layout, expert_alignment=32),
            buffer.dispatch(x, **layout, topk_idx=topk_idx, expert_alignment=8),
            buffer.dispatch(
                x, **layout, topk_idx=topk_idx, topk_weights=weights, expert_alignment=128
            ),
        ]
        return [received(*result) for result in results]


@pytest.mark.parametrize("case", ["uneven", "duplicates", "nobody"])
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_experts_weights_and_alignment_are_optional(pool, transport, num_ranks, case):
    routing = ROUTING_CASES[case].make(num_ranks, seed=6)
    bare, bare_aligned, unweighted, aligned = zip(
        *pool.run(dispatch_in_other_ways, transport, routing, num_ranks=num_ranks), strict=True
    )

    def right(alignment, **without):
        found = oracle_dispatch(routing, KINDS["bf16"], expert_alignment=alignment)
        return [each._replace(**without) for each in found]

    nothing = {"recv_topk_idx": None, "recv_topk_weights": None}
    assert not dispatch_faults(bare, right(1, **nothing))
    assert not dispatch_faults(bare_aligned, right(32, **nothing))
    assert not dispatch_faults(unweighted, right(8, recv_topk_weights=None))
    assert not dispatch_faults(aligned, right(128))


def dispatch_half(group, transport, routing):
    """Takes every second token out of `is_token_in_rank` alone."""
    kind, rank = KINDS["bf16"], group.rank()
    topk_idx = routing.topk_idxs[rank]
    with open_buffer(group, transport) as buffer:
        layout = lay_out(buffer, routing)
        layout["is_token_in_rank"][::2] = False
        got = buffer.dispatch(
            kind.make(rank, len(topk_idx), kind.hidden),
            **layout,
            topk_idx=topk_idx,
            topk_weights=make_weights(topk_idx, rank),
        )
        return received(*got)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_presence_decides_what_travels(pool, transport):
    routing = ROUTING_CASES["uneven"].make(4, seed=7)
    presence = [
        reference.layout(idx, routing.num_experts, 4).is_token_in_rank for idx in routing.topk_idxs
    ]
    for each in presence:
        each[::2] = False
    got = pool.run(dispatch_half, transport, routing)
    right = oracle_dispatch(routing, KINDS["bf16"], is_token_in_ranks=presence)
    assert not dispatch_faults(got, right)


def keep_results(group, transport, routing, num_kept):
    """Holds results while others are made, the buffer grows, and is destroyed at last."""
    rank, num_tokens = group.rank(), len(routing.topk_idxs[group.rank()])
    with open_buffer(group, transport) as buffer:
        layout, kept = lay_out(buffer, routing), []
        for index in range(num_kept):
            hidden = 16 * (1 + index // 3)
            rows = origin_rows(rank + 4 * index, num_tokens, hidden, dtype=torch.float32)
            kept.append(buffer.dispatch(rows, **layout))
            kept[-1][0].mul_(2)
            buffer.combine(kept[-1][0], kept[-1][4])
    return [copied(each[0]) for each in kept]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_results_outlive_later_calls_and_the_buffer(pool, transport):
    routing, num_kept = ROUTING_CASES["uneven"].make(4, seed=2), 12
    everything = pool.run(keep_results, transport, routing, num_kept)
    for index in range(num_kept):
        kind = Kind(16 * (1 + index // 3), plain(torch.float32))
        right = oracle_dispatch(routing, kind, offset=4 * index)
        assert not row_faults([each[index] for each in everything], [x.recv_x * 2 for x in right])


def sum_in_order(group, transport, routing, dtype, hidden):
    rank, num_tokens = group.rank(), len(routing.topk_idxs[group.rank()])
    with open_buffer(group, transport) as buffer:
        x = origin_rows(rank, num_tokens, hidden, dtype=dtype)
        handle = buffer.dispatch(x, **lay_out(buffer, routing))[4]
        answers = make_scattered(len(handle.recv_src_idx), hidden, dtype, rank)
        bias = make_scattered(num_tokens, hidden, dtype, 20 + rank)
        return [buffer.combine(answers, handle, bias=each)[0] for each in (None, bias)]


def make_scattered(num_rows, hidden, dtype, seed):
    """Rows whose elements differ so much in size that the order of additions shows."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn((num_rows, hidden), generator=generator)
    return (rows * 2.0 ** torch.randint(-9, 9, rows.shape, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_sums_are_taken_in_float32_in_rank_order(pool, transport, dtype):
    routing, hidden = ROUTING_CASES["slots_empty"].make(4, seed=4), 65
    got = pool.run(sum_in_order, transport, routing, dtype, hidden)
    presence = [reference.layout(idx, routing.num_experts, 4)[2] for idx in routing.topk_idxs]
    origins = reference.arrivals(presence)
    sums = [torch.zeros((len(idx), hidden), dtype=torch.float32) for idx in routing.topk_idxs]
    for rank in range(4):
        rows = make_scattered(len(origins[rank]), hidden, dtype, rank)
        for row, (source, token) in zip(rows, origins[rank], strict=True):
            sums[source][token] += row.float()
    for rank in range(4):
        bias = make_scattered(len(sums[rank]), hidden, dtype, 20 + rank)
        assert not difference(got[rank][0], sums[rank].to(dtype))
        assert not difference(got[rank][1], (sums[rank] + bias.float()).to(dtype))


def use_two_buffers(group, routings):
    """Two buffers of different transports, whose calls alternate."""
    rank = group.rank()
    with contextlib.ExitStack() as stack:
        buffers = [stack.enter_context(open_buffer(group, name)) for name in TRANSPORTS]
        pairs = list(zip(buffers, routings, strict=True))
        kind, results = KINDS["fp32"], []
        for buffer, routing in pairs:
            x = kind.make(rank, len(routing.topk_idxs[rank]), kind.hidden)
            results.append(buffer.dispatch(x, **lay_out(buffer, routing)))
        for (buffer, _), result in zip(pairs, results, strict=True):
            buffer.combine(result[0], result[4])
        return [copied(result[0]) for result in results]


def test_two_buffers_do_not_disturb_each_other(pool):
    routings = [ROUTING_CASES[name].make(4, seed=1) for name in ("uneven", "one_choice")]
    everything = pool.run(use_two_buffers, routings)
    for index, routing in enumerate(routings):
        right = oracle_dispatch(routing, KINDS["fp32"])
        assert not row_faults([each[index] for each in everything], [x.recv_x for x in right])


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_wide_rows_and_many_choices(pool, transport):
    generator = torch.Generator().manual_seed(0)
    idxs = [choose(num, 66, 22, generator=generator) for num in (40, 7, 23)]
    routing, kind = Routing(idxs, 66), Kind(7168, plain(torch.bfloat16))
    got = pool.run(dispatch_wide, transport, routing, num_ranks=3)
    assert not dispatch_faults(got, oracle_dispatch(routing, kind))


def dispatch_wide(group, transport, routing):
    rank, topk_idx = group.rank(), routing.topk_idxs[group.rank()]
    with open_buffer(group, transport) as buffer:
        x = origin_rows(rank, len(topk_idx), 7168, dtype=torch.bfloat16)
        weights = make_weights(topk_idx, rank)
        layout = lay_out(buffer, routing)
        return received(*buffer.dispatch(x, **layout, topk_idx=topk_idx, topk_weights=weights))


def go_with_odd_defaults(group, transport, routing):
    """Callers set the default dtype to bf16 and the default device to one of theirs."""
    rank, kind = group.rank(), KINDS["fp8, fp32 scales"]
    topk_idx = routing.topk_idxs[rank]
    x, weights = kind.make(rank, len(topk_idx), kind.hidden), make_weights(topk_idx, rank)
    num_rows = len(oracle_dispatch(routing, kind)[rank].recv_src_idx)
    answers, bias = make_answers(num_rows, kind, seed=rank), make_biases(routing, kind, rank)
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        with open_buffer(group, transport) as buffer:
            layout = lay_out(buffer, routing)
            given = {**layout, "topk_idx": topk_idx, "topk_weights": weights}
            padded = received(*buffer.dispatch(x, **given, num_worst_tokens=80))
            exact = buffer.dispatch(x, **given)
            return (
                padded,
                received(*exact),
                Returned(*buffer.combine(answers, exact[4])[:2]),
                (Returned(*buffer.combine(answers, exact[4], bias=bias)[:2])),
            )
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_defaults_of_the_caller_do_not_matter(pool, transport):
    routing, kind = ROUTING_CASES["uneven"].make(2, seed=3), KINDS["fp8, fp32 scales"]
    job = (go_with_odd_defaults, transport, routing)
    padded, got, returned, biased = zip(*pool.run(*job, num_ranks=2), strict=True)
    right = oracle_dispatch(routing, kind)
    num_rows = [len(each.recv_src_idx) for each in right]
    assert not dispatch_faults(got, right)
    fronts = [cut(each, num, [])[:3] for each, num in zip(padded, num_rows, strict=True)]
    assert not row_faults([each[0] for each in fronts], [each.recv_x for each in right])
    answers = [make_answers(num, kind, seed=rank) for rank, num in enumerate(num_rows)]
    biases = [make_biases(routing, kind, rank) for rank in range(2)]
    for sums, added in ((returned, None), (biased, biases)):
        exact = reference.combine(answers, routing.topk_idxs, routing.num_experts, biases=added)
        assert not combine_faults(sums, exact, count_addends(routing, 2 if added else 0))


def go_with_strides(group, transport, routing):
    """Every tensor is a view that is not contiguous, and some need gradients."""
    rank = group.rank()
    topk_idx, kind = transposed(routing.topk_idxs[rank]), KINDS["bf16"]
    x = transposed(kind.make(rank, len(topk_idx), kind.hidden)).requires_grad_()
    weights = transposed(make_weights(topk_idx, rank)).requires_grad_()
    with open_buffer(group, transport) as buffer, torch.inference_mode(mode=rank == 1):
        layout = {
            name: transposed(value) if value is not None and value.dim() == 2 else value
            for name, value in lay_out(buffer, routing).items()
        }
        exact = buffer.dispatch(x, **layout, topk_idx=topk_idx, topk_weights=weights)
        answers = make_answers(len(exact[0]), kind, seed=rank)
        bias = tuple(map(transposed, make_biases(routing, kind, rank)))
        handle = [transposed(part) if part.dim() == 2 else part for part in exact[4]]
        weights = transposed(exact[2])
        returned = buffer.combine(transposed(answers), handle, topk_weights=weights, bias=bias)
        assert not any(tensor.requires_grad for tensor in (exact[0], exact[2], *returned[:2]))
        return received(*exact), Returned(*returned[:2])


def transposed(tensor):
    """The same values, laid out column after column."""
    return tensor.t().contiguous().t()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_strides_and_gradients_do_not_matter(pool, transport):
    routing, kind = ROUTING_CASES["uneven"].make(3, seed=3), KINDS["bf16"]
    job = (go_with_strides, transport, routing)
    got, returned = zip(*pool.run(*job, num_ranks=3), strict=True)
    right = oracle_dispatch(routing, kind)
    assert not dispatch_faults(got, right)
    answers = [make_answers(len(each[5]), kind, seed=rank) for rank, each in enumerate(right)]
    exact = reference.combine(
        answers,
        routing.topk_idxs,
        routing.num_experts,
        topk_weights=[each.recv_topk_weights for each in right],
        biases=[make_biases(routing, kind, rank) for rank in range(3)],
    )
    assert not combine_faults(returned, exact, count_addends(routing, 2))
