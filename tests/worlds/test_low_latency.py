"""Low-latency dispatch and combine, against the oracle: what arrives, and what comes back.

All routing cases, formats, transports and numbers of ranks are tried with one another (`-k` picks).
Slabs or compact rows, with a hook or without, are four ways more; a world takes one of them, by
turns (`way_of`), so that on every transport each way meets every pair of case and format, of case
and number of ranks, and of format and number of ranks. In each of these worlds tokens travel once
through experts that change nothing, and once through experts that answer noise, in the form in
which dispatch did not give the rows. Widths and numbers of choices have a list of their own
(`SHAPES`), and so have the orders in which sums are taken (`ORDERS`).
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import pytest
import torch

from crossdock import reference_low_latency as oracle
from crossdock.cases import ROUTING_CASES, Routing
from tests.worlds.low_latency_checks import Form, slab_faults, sum_faults
from tests.worlds.low_latency_worlds import (
    TRANSPORTS,
    WIDTHS,
    Right,
    combine,
    dispatch,
    draw,
    form_for,
    format_of,
    go_everywhere,
    go_once,
    judge,
    judge_case,
    lay_out,
    make_tokens,
    noise_for,
    open_buffer,
    poison,
    run_world,
    trip_faults,
)

WAYS = list(itertools.product(("slab", "compact"), (False, True)))


# The matrix.


def way_of(transport: str, num_ranks: int, case: str, name: str) -> tuple[str, bool]:
    """Which of the four ways a world takes."""
    turn = TRANSPORTS.index(transport) + num_ranks
    return WAYS[(turn + list(ROUTING_CASES).index(case) + list(WIDTHS).index(name)) % 4]


@pytest.mark.parametrize("case", ROUTING_CASES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_rows_arrive_and_come_back(pool, transport, num_ranks, case):
    routing, plans = draw(case, num_ranks), []
    for name in WIDTHS:
        rows, use_hook = way_of(transport, num_ranks, case, name)
        plans.append((form_for(routing, name, rows), use_hook))
    everything = run_world(pool, transport, go_everywhere, routing, plans, num_ranks=num_ranks)
    for index, (form, use_hook) in enumerate(plans):
        trips = [each[index] for each in everything]
        right = judge_case(case, num_ranks, form.name)
        assert not trip_faults(trips, right, routing, form), f"{form}, hook {use_hook}"


def test_each_way_meets_every_pair():
    settings = itertools.product(TRANSPORTS, (1, 2, 3, 4), ROUTING_CASES, WIDTHS)
    met = set()
    for transport, *others in settings:
        way = way_of(transport, *others)
        met.update((transport, *pair, way) for pair in itertools.combinations(others, 2))
    num_pairs = 4 * len(ROUTING_CASES) + 4 * len(WIDTHS) + len(ROUTING_CASES) * len(WIDTHS)
    assert len(met) == len(TRANSPORTS) * len(WAYS) * num_pairs


# Widths and numbers of choices.


class Shape(NamedTuple):
    """A width and a number of choices, in a world of three ranks."""

    name: str
    rows: str
    hidden: int
    num_topk: int
    num_local: int = 4
    use_hook: bool = False


SHAPES = [
    Shape("bf16", "slab", 1, 22, num_local=8),
    Shape("bf16", "compact", 33, 22, num_local=30, use_hook=True),
    Shape("bf16", "slab", 8192, 8, use_hook=True),
    Shape("bf16", "compact", 4095, 1),
    Shape("fp8", "slab", 128, 22, num_local=22),
    Shape("fp8", "compact", 7168, 8, use_hook=True),
    Shape("fp8", "slab", 8192, 2),
    Shape("fp8_round_scale", "compact", 384, 6, num_local=2),
    Shape("fp8_round_scale", "slab", 7168, 3, use_hook=True),
    Shape("fp8_ue8m0", "compact", 1024, 22, num_local=8),
    Shape("fp8_ue8m0", "slab", 7168, 4),
    Shape("fp8_ue8m0", "compact", 8192, 1, use_hook=True),
    Shape("int8", "slab", 1, 1, num_local=1, use_hook=True),
    Shape("int8", "slab", 32, 12, num_local=5),
    Shape("int8", "compact", 7168, 22, num_local=8),
]


def draw_shape(shape: Shape) -> Routing:
    """Few tokens that name some experts twice, and nobody in some slots."""
    generator = torch.Generator().manual_seed(shape.hidden)
    num_experts = 3 * shape.num_local
    idxs = []
    for num_tokens in (5, 0, 3):
        idx = torch.randint(-1, num_experts, (num_tokens, shape.num_topk), generator=generator)
        idxs.append(idx)
    return Routing(idxs, num_experts)


def go_in_shapes(world, transport, shapes):
    results = []
    for shape, routing, form in shapes:
        room = {"num_slots": form.num_slots, "hidden": form.hidden}
        with open_buffer(world, transport, **room, **format_of(form)) as buffer:
            results.append(go_once(buffer, routing, form, use_hook=shape.use_hook))
    return results


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_all_widths_and_numbers_of_choices(pool, transport):
    shapes = []
    for shape in SHAPES:
        form = Form(shape.name, shape.rows, 6, shape.hidden)
        shapes.append((shape, draw_shape(shape), form))
    everything = run_world(pool, transport, go_in_shapes, shapes, num_ranks=3)
    for index, (shape, routing, form) in enumerate(shapes):
        trips = [each[index] for each in everything]
        assert not trip_faults(trips, judge_shape(shape, form), routing, form), shape


@functools.cache
def judge_shape(shape: Shape, form: Form) -> Right:
    return judge(draw_shape(shape), form)


# What cannot be encoded stays visible.


def spoil(rank: int, num_tokens: int, form: Form) -> torch.Tensor:
    """Tokens some of which hold infinities and NaN, each kind alone and together."""
    x, lost = make_tokens(rank, num_tokens, form), (torch.inf, -torch.inf, torch.nan)
    for token, value in enumerate(lost):
        x[2 * token, 3] = value
        x[7, token] = value
    return x


def dispatch_spoiled(world, transport, routing, forms):
    results = []
    for form in forms:
        with open_buffer(world, transport, **format_of(form)) as buffer:
            x = spoil(buffer.rank, 16, form)
            results.append(dispatch(buffer, routing, form, x=x))
    return results


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_cannot_be_encoded_arrives_as_documented(pool, transport):
    routing = draw("uniform", 2)
    forms = [form_for(routing, name) for name in WIDTHS]
    everything = run_world(pool, transport, dispatch_spoiled, routing, forms, num_ranks=2)
    for index, form in enumerate(forms):
        xs = [spoil(rank, 16, form) for rank in range(2)]
        right = oracle.dispatch(
            xs, routing.topk_idxs, num_experts=routing.num_experts, format=form.name
        )
        assert not slab_faults([each[index] for each in everything], right, form, routing), form


# How sums are rounded, and in which order they are taken.


def combine_with_partials(world, transport, routing, form, partials):
    with open_buffer(world, transport, **format_of(form), partials=partials) as buffer:
        poison(buffer)
        got = dispatch(buffer, routing, form)
        noise = noise_for(buffer, got, form, routing)
        return [
            combine(buffer, noise, routing, got.handle, use_logfmt=use_logfmt)
            for use_logfmt in (False, True)
        ]


@pytest.mark.parametrize("case", ["uniform", "tokens_empty", "one_rank_empty"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_partial_sums_are_rounded_as_asked(pool, transport, case):
    routing, kinds = draw(case, 4), {"bf16": torch.bfloat16, "fp32": torch.float32}
    form, found = form_for(routing, "bf16"), {}
    for name in kinds:
        job = (combine_with_partials, routing, form, name)
        found[name] = list(zip(*run_world(pool, transport, *job), strict=True))
    right = judge_case(case, 4, "bf16").noise
    for name, partials in kinds.items():
        exact, in_ten_bits = found[name]
        assert not sum_faults(exact, right, partials=partials)
        assert not sum_faults(in_ten_bits, right, partials=partials, use_logfmt=True)
        assert sum_faults(in_ten_bits, right, partials=partials)
    assert sum_faults(found["bf16"][0], right, partials=torch.float32)
    assert sum_faults(found["fp32"][0], right, partials=torch.bfloat16)


BIG = 2.0**30
ANSWERS = (BIG, 1, -BIG, 1, -BIG, 0, -BIG, 1, 0)
"""What the experts answer, three on each of three ranks: BIG + 1 is BIG in float32."""
ORDERS = {
    (0, 1, 2): 0,
    (0, 2, 1): 1,
    (1, 0, 2): 0,
    (2, 0, 1): 1,
    (0, 3, 6): 0,
    (6, 3, 0): 0,
    (3, 6, 0): 0,
    (0, 4, 7): 1,
    (7, 0, 4): 1,
    (0, 3, 2): 1,
    (2, 3, 0): 1,
}
"""What a token's choices sum up to: first the slots of a rank in their order, then the ranks."""


def sum_in_order(world, transport, routing, form, partials):
    with open_buffer(world, transport, **format_of(form), partials=partials) as buffer:
        got = dispatch(buffer, routing, form)
        mine = ANSWERS[3 * buffer.rank : 3 * buffer.rank + 3]
        counts = got.recv_count.tolist()
        rows = [
            torch.full((count, form.hidden), value).bfloat16()
            for count, value in zip(counts, mine, strict=True)
        ]
        topk_idx = routing.topk_idxs[buffer.rank]
        weights = torch.ones(topk_idx.shape)
        answers = lay_out(rows, form, routing)
        return buffer.low_latency_combine(answers, topk_idx, weights, got.handle)[0]


@pytest.mark.parametrize("partials", ["bf16", "fp32"])
@pytest.mark.parametrize("rows", ["slab", "compact"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_sums_are_taken_by_slot_and_then_by_rank(pool, transport, rows, partials):
    routing = Routing([torch.tensor(list(ORDERS))] * 3, 9)
    form = Form("bf16", rows, len(ORDERS), 5)
    job = (sum_in_order, routing, form, partials)
    for combined in run_world(pool, transport, *job, num_ranks=3):
        assert combined.tolist() == [[value] * 5 for value in ORDERS.values()]
