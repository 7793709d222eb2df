"""Low-latency calls whose rows are moved by kernels, interpreted, against the oracle.

The tests of the other transports, most of them, in small worlds, with what is said of devices
alone: a dispatch that brings the weights, what a copied handle is answered, and calls that overtake
each other.
"""

from __future__ import annotations

import pytest
import torch

from crossdock import HandleError, reference
from crossdock.cases import ROUTING_CASES
from tests.worlds import test_high_throughput as high_throughput
from tests.worlds import test_low_latency as world
from tests.worlds import test_low_latency_calls as calls
from tests.worlds.checks import difference, row_faults
from tests.worlds.device_worlds import draw, judge_case
from tests.worlds.low_latency_checks import Form, slab_faults, sum_faults
from tests.worlds.low_latency_worlds import (
    WIDTHS,
    combine,
    dispatch,
    form_for,
    format_of,
    give_weights,
    make_tokens,
    noise_for,
    open_buffer,
    poison,
    run_world,
    start_combine,
    start_dispatch,
)

NAMES = list(WIDTHS)


@pytest.fixture(autouse=True)
def _small_worlds(monkeypatch):
    for module in (world, calls):
        monkeypatch.setattr(module, "draw", draw)
        monkeypatch.setattr(module, "judge_case", judge_case)
    monkeypatch.setattr(world, "TRANSPORTS", [*world.TRANSPORTS, "device"])


def go_there_and_back(pool, monkeypatch, num_ranks, case, names):
    monkeypatch.setattr(world, "WIDTHS", {name: WIDTHS[name] for name in names})
    world.test_rows_arrive_and_come_back(pool, "device", num_ranks, case)


@pytest.mark.parametrize("case", ROUTING_CASES)
def test_rows_arrive_and_come_back(interpreted_pool, monkeypatch, case):
    name = NAMES[list(ROUTING_CASES).index(case) % len(NAMES)]
    go_there_and_back(interpreted_pool, monkeypatch, 3, case, [name])


OTHER_WORLDS = [(1, "all_experts"), (1, "duplicates"), (2, "all_to_one"), (2, "slots_empty")]


def test_every_format_goes_every_way():
    """In the worlds of the next test: slabs and compact rows, at once and by hooks."""
    for name in NAMES:
        ways = [world.way_of("device", *each, name) for each in OTHER_WORLDS]
        assert set(ways) == set(world.WAYS)


@pytest.mark.parametrize(("num_ranks", "case"), OTHER_WORLDS)
def test_rows_of_all_formats_arrive_in_other_worlds(interpreted_pool, monkeypatch, num_ranks, case):
    go_there_and_back(interpreted_pool, monkeypatch, num_ranks, case, NAMES)


def test_rows_arrive_on_four_ranks(interpreted_pool, monkeypatch):
    go_there_and_back(interpreted_pool, monkeypatch, 4, "one_rank_empty", ["fp8"])


def test_what_cannot_be_encoded_arrives_as_documented(interpreted_pool, monkeypatch):
    monkeypatch.setattr(world, "WIDTHS", {name: WIDTHS[name] for name in ("fp8", "int8")})
    monkeypatch.setattr(world, "draw", lambda case, num_ranks: draw(case, num_ranks, most=16))
    world.test_what_cannot_be_encoded_arrives_as_documented(interpreted_pool, "device")


SHAPES = [
    world.Shape("bf16", "slab", 1, 22, num_local=8),
    world.Shape("bf16", "compact", 33, 22, num_local=30, use_hook=True),
    world.Shape("bf16", "slab", 4095, 1, num_local=1),
    world.Shape("fp8", "compact", 7168, 8, use_hook=True),
    world.Shape("fp8_round_scale", "compact", 384, 6, num_local=2),
    world.Shape("fp8_ue8m0", "slab", 1024, 4),
    world.Shape("int8", "slab", 1, 1, num_local=1, use_hook=True),
    # Rows of several pieces, of which the last one is partly filled.
    world.Shape("fp8", "slab", 1152, 8),
    world.Shape("int8", "compact", 2100, 4),
]


def test_widths_and_numbers_of_choices(interpreted_pool, monkeypatch):
    monkeypatch.setattr(world, "SHAPES", SHAPES)
    world.test_all_widths_and_numbers_of_choices(interpreted_pool, "device")


def test_without_use_fp8_its_switches_say_nothing(interpreted_pool):
    calls.test_without_use_fp8_its_switches_say_nothing(interpreted_pool, "device")


def combine_with_weights(group, transport, routing, form, *, partials, early, use_hook):
    """Weights are given to dispatch, or to combine alone."""
    with open_buffer(group, transport, **format_of(form), partials=partials) as buffer:
        poison(buffer)
        topk_idx = routing.topk_idxs[buffer.rank]
        rest = {"topk_weights": give_weights(topk_idx, buffer.rank)} if early else {}
        got = dispatch(buffer, routing, form, use_hook=use_hook, **rest)
        noise = noise_for(buffer, got, form, routing)
        return got, combine(buffer, noise, routing, got.handle, use_hook=use_hook)


@pytest.mark.parametrize("partials", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("early", "rows", "case"),
    [(True, "slab", "uneven"), (True, "compact", "slots_empty"), (False, "slab", "duplicates")],
)
def test_weights_may_come_early_and_sums_are_rounded_as_asked(
    interpreted_pool, partials, early, rows, case
):
    routing, num_ranks = draw(case, 2), 2
    form = form_for(routing, "bf16", rows)
    job = in_small_world(combine_with_weights, routing, form)
    options = {"partials": partials, "early": early, "use_hook": case == "uneven"}
    got, combined = zip(*job(interpreted_pool, num_ranks, **options), strict=True)
    right = judge_case(case, num_ranks, "bf16")
    assert not slab_faults(got, right.slabs, form, routing)
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    assert not sum_faults(combined, right.noise, partials=dtypes[partials])


def in_small_world(job, *args):
    """A job whose options are given when it is run."""
    return lambda pool, num_ranks, **options: run_world(
        pool, "device", with_options, job, args, options, num_ranks=num_ranks
    )


def with_options(group, transport, job, args, options):
    return job(group, transport, *args, **options)


def test_sums_are_taken_by_slot_and_then_by_rank(interpreted_pool):
    world.test_sums_are_taken_by_slot_and_then_by_rank(interpreted_pool, "device", "slab", "fp32")


@pytest.mark.parametrize("case", ["uniform", "one_rank_empty"])
def test_partial_sums_are_rounded_as_asked(interpreted_pool, case):
    world.test_partial_sums_are_rounded_as_asked(interpreted_pool, "device", case)


# Ways of calling.


def with_a_hook(call):
    """Rows and weights are on their way when it returns; choices are looked at once more."""
    out = torch.full((len(call.topk_idx), call.slab.shape[2]), torch.nan).bfloat16()
    arguments = (call.slab, call.topk_idx, call.weights, call.handle)
    combined, _, hook = call.buffer.low_latency_combine(*arguments, return_recv_hook=True, out=out)
    call.slab.zero_()
    call.weights.zero_()
    hook()
    hook()
    assert combined is out
    return out


WAYS = {
    **{name: way for name, way in calls.COMBINE_WAYS.items() if name != "cloned handle"},
    "hook": with_a_hook,
}
"""A device cannot use a copy of a handle: it looks behind the handle's own tensors for more."""


def combine_in_all_ways(group, transport, routing, form, *, early):
    with open_buffer(group, transport, **format_of(form)) as buffer:
        topk_idx = routing.topk_idxs[buffer.rank].clone()
        weights = give_weights(topk_idx, buffer.rank)
        got = dispatch(buffer, routing, form, **({"topk_weights": weights} if early else {}))
        slab, compact = (
            noise_for(buffer, got, Form(form.name, rows, form.num_slots, form.hidden), routing)
            for rows in ("slab", "compact")
        )
        call = calls.Call(buffer, slab, compact, topk_idx, weights, got.handle)
        with pytest.raises(HandleError, match="copy"):
            calls.with_cloned_handle(call)
        return {name: way(call) for name, way in WAYS.items()}


@pytest.mark.parametrize(("rows", "early"), [("slab", False), ("compact", True)])
def test_all_ways_of_calling_combine_give_the_same(interpreted_pool, rows, early):
    routing = draw("slots_empty", 2)
    form = form_for(routing, "fp8", rows)
    job = in_small_world(combine_in_all_ways, routing, form)
    got = job(interpreted_pool, 2, early=early)
    right = judge_case("slots_empty", 2, "fp8")
    assert not sum_faults([each["slab"] for each in got], right.noise)
    for each in got:
        assert len(each) == len(WAYS)
        for name, combined in each.items():
            assert not difference(combined, each["slab"]), name


def test_rows_are_counted_by_the_hook(interpreted_pool):
    routing = draw("uneven", 3)
    form = form_for(routing, "bf16", "compact")
    right = judge_case("uneven", 3, "bf16").slabs
    job = (calls.count_rows, routing, form)
    results = run_world(interpreted_pool, "device", *job, num_ranks=3)
    for (_, count, seen), each in zip(results, right, strict=True):
        assert count.tolist() == each.recv_count
        start = torch.arange(4, dtype=torch.int32)
        for times, counted in zip((1, 1, 2), seen, strict=True):
            assert not difference(counted, start + times * count)


@pytest.mark.parametrize("how", ["the other way round", "in order on even ranks"])
def test_two_batches_pass_through_each_other(interpreted_pool, monkeypatch, how):
    cut_to_two_ranks(monkeypatch)
    calls.test_two_batches_pass_through_each_other(interpreted_pool, "device", how)


def test_every_call_may_have_its_own_number_of_slots(interpreted_pool, monkeypatch):
    cut_to_two_ranks(monkeypatch)
    calls.test_every_call_may_have_its_own_number_of_slots(interpreted_pool, "device")


def cut_to_two_ranks(monkeypatch):
    """For tests that ask for four, which are many."""
    monkeypatch.setattr(calls, "draw", lambda case, _: draw(case, 2))
    monkeypatch.setattr(calls, "judge_case", lambda case, _, name: judge_case(case, 2, name))

    def run(pool, transport, job, *args, **options):
        return run_world(pool, transport, job, *args, **{**options, "num_ranks": 2})

    monkeypatch.setattr(calls, "run_world", run)


def go_with_odd_habits(group, transport, routing, forms):
    """The default dtype is bf16 and the default device another; tokens have strides."""
    rank, results = group.rank(), []
    topk_idx = routing.topk_idxs[rank]
    weights = give_weights(topk_idx, rank).requires_grad_()
    for form in forms:
        x = calls.make_tokens(rank, len(topk_idx), form).t().contiguous().t().requires_grad_()
        with (
            torch.inference_mode(mode=rank == 1),
            calls.deviating_defaults(),
            open_buffer(group, transport, **format_of(form)) as buffer,
        ):
            rest = {"topk_weights": weights, "async_finish": True}
            results.append(dispatch(buffer, routing, form, x=x, use_hook=rank == 0, **rest))
            assert not results[-1].recv_count.requires_grad
    return results


def test_defaults_strides_and_gradients_of_the_caller_do_not_matter(interpreted_pool):
    routing = draw("slots_empty", 2)
    forms = [form_for(routing, *plan) for plan in (("int8", "compact"), ("fp8_ue8m0", "slab"))]
    job = (go_with_odd_habits, routing, forms)
    everything = run_world(interpreted_pool, "device", *job, num_ranks=2)
    for got, form in zip(zip(*everything, strict=True), forms, strict=True):
        right = judge_case("slots_empty", 2, form.name)
        assert not slab_faults(got, right.slabs, form, routing)


def overtake(group, transport, routings, form):
    """The second call is received first, and a third one made before the first is received."""
    with open_buffer(group, transport) as buffer:
        first, receive_first = start_dispatch(buffer, routings[0], form, return_recv_hook=True)
        second = dispatch(buffer, routings[1], form, use_hook=True)
        try:
            third, hook = start_dispatch(buffer, routings[2], form, return_recv_hook=True)
        except HandleError as error:
            return str(error)
        receive_first()
        hook()
        return [first, second, third]


def test_a_call_that_is_overtaken_twice_keeps_its_rows_or_is_refused(interpreted_pool):
    """There is room for two in flight; which of them is received is each rank's own business."""
    routings = [draw(case, 2) for case in ("uniform", "slots_empty", "duplicates")]
    form = form_for(routings[0], "bf16")
    job = (overtake, routings, form)
    results = run_world(interpreted_pool, "device", *job, num_ranks=2)
    if all(isinstance(each, str) for each in results):
        assert all("hook" in each for each in results)
        return
    for index, case in enumerate(("uniform", "slots_empty", "duplicates")):
        right = judge_case(case, 2, "bf16").slabs
        assert not slab_faults([each[index] for each in results], right, form, routings[index])


def decode_beside_a_prefill(group, transport, routing, form):
    """Rows of the one kind are in flight while the other kind of calls is made."""
    with open_buffer(group, transport, **format_of(form)) as buffer:
        results = []
        for _ in range(2):
            got, receive = start_dispatch(buffer, routing, form, return_recv_hook=True)
            x = make_tokens(buffer.rank, len(routing.topk_idxs[buffer.rank]), form)
            made = buffer.dispatch(x, **high_throughput.lay_out(buffer, routing))
            receive()
            noise = noise_for(buffer, got, form, routing)
            combined, receive = start_combine(
                buffer, noise, routing, got.handle, return_recv_hook=True
            )
            back = buffer.combine(made[0], made[4])[0]
            receive()
            results.append((got, combined, made[0], back))
        return results


def test_both_kinds_of_calls_share_a_buffer(interpreted_pool):
    routing = draw("uneven", 2)
    form = form_for(routing, "bf16")
    job = (decode_beside_a_prefill, routing, form)
    everything = run_world(interpreted_pool, "device", *job, num_ranks=2)
    right = judge_case("uneven", 2, "bf16")
    xs = [make_tokens(rank, len(idx), form) for rank, idx in enumerate(routing.topk_idxs)]
    moved = reference.dispatch(xs, routing.topk_idxs, num_experts=routing.num_experts)
    num_addends = high_throughput.count_addends(routing)
    for turn in zip(*everything, strict=True):
        slabs, combined, rows, back = zip(*turn, strict=True)
        assert not slab_faults(slabs, right.slabs, form, routing)
        assert not sum_faults(combined, right.noise)
        assert not row_faults(rows, [each.recv_x for each in moved])
        for x, sums, num in zip(xs, back, num_addends, strict=True):
            assert torch.equal(sums, x * num[:, None])
