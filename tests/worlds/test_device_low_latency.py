"""Low-latency calls whose rows are moved by kernels, interpreted, against the oracle.

The tests of the other transports, some of them, in small worlds, with what is said of devices
alone: a dispatch that brings the weights, and what a copied handle is answered.
"""

from __future__ import annotations

import pytest
import torch

from crossdock import HandleError, UnsupportedError
from crossdock.cases import ROUTING_CASES
from tests.worlds import test_low_latency as world
from tests.worlds import test_low_latency_calls as calls
from tests.worlds.checks import difference
from tests.worlds.device_worlds import draw, judge_case
from tests.worlds.low_latency_checks import Form, slab_faults, sum_faults
from tests.worlds.low_latency_worlds import (
    WIDTHS,
    combine,
    dispatch,
    form_for,
    format_of,
    give_weights,
    noise_for,
    open_buffer,
    poison,
    run_world,
    start_dispatch,
)

pytestmark = pytest.mark.slow

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


@pytest.mark.parametrize(("num_ranks", "case"), [(1, "duplicates"), (2, "slots_empty")])
def test_rows_of_all_formats_arrive_in_other_worlds(interpreted_pool, monkeypatch, num_ranks, case):
    go_there_and_back(interpreted_pool, monkeypatch, num_ranks, case, NAMES)


def test_rows_arrive_on_four_ranks(interpreted_pool, monkeypatch):
    go_there_and_back(interpreted_pool, monkeypatch, 4, "one_rank_empty", ["fp8"])


def test_what_cannot_be_encoded_arrives_as_documented(interpreted_pool, monkeypatch):
    monkeypatch.setattr(world, "WIDTHS", {name: WIDTHS[name] for name in ("fp8", "int8")})
    monkeypatch.setattr(world, "draw", lambda case, num_ranks: draw(case, num_ranks, most=16))
    world.test_what_cannot_be_encoded_arrives_as_documented(interpreted_pool, "device")


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


# Ways of calling.

HOST_ALONE = {"cloned handle", "handle cloned on one rank"}
"""What a device cannot do: it looks behind the handle's own tensors for more."""


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
        ways = calls.COMBINE_WAYS.items()
        return {name: way(call) for name, way in ways if name not in HOST_ALONE}


@pytest.mark.parametrize(("rows", "early"), [("slab", False), ("compact", True)])
def test_all_ways_of_calling_combine_give_the_same(interpreted_pool, rows, early):
    routing = draw("slots_empty", 2)
    form = form_for(routing, "fp8", rows)
    job = in_small_world(combine_in_all_ways, routing, form)
    got = job(interpreted_pool, 2, early=early)
    right = judge_case("slots_empty", 2, "fp8")
    assert not sum_faults([each["slab"] for each in got], right.noise)
    for each in got:
        assert len(each) == len(calls.COMBINE_WAYS) - 1
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


def ask_for_what_there_is_not(group, transport, routing, form):
    with open_buffer(group, transport) as buffer:
        got = dispatch(buffer, routing, form)
        noise = noise_for(buffer, got, form, routing)
        with pytest.raises(UnsupportedError, match="logfmt"):
            combine(buffer, noise, routing, got.handle, use_logfmt=True)
        return combine(buffer, noise, routing, got.handle)


def test_what_is_not_there_is_said_before_anything_is_sent(interpreted_pool):
    routing = draw("uniform", 2)
    form = form_for(routing, "bf16")
    job = (ask_for_what_there_is_not, routing, form)
    combined = run_world(interpreted_pool, "device", *job, num_ranks=2)
    assert not sum_faults(combined, judge_case("uniform", 2, "bf16").noise)


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
