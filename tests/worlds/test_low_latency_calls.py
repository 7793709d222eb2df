"""The ways in which low-latency calls may be made: all of them give what the oracle says.

Every argument, form of a handle and habit of a caller is tried once for each transport; so are
statistics, hooks that other threads run or that run in another order, and two batches on their way
at a time. Which formats, cases and widths there are is the matter of `test_low_latency`.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from crossdock import Buffer
from crossdock import reference_low_latency as oracle
from tests.worlds.checks import difference
from tests.worlds.low_latency_checks import Form, slab_faults, sum_faults
from tests.worlds.low_latency_worlds import (
    CULPRIT,
    TRANSPORTS,
    combine,
    dispatch,
    draw,
    form_for,
    format_of,
    give_weights,
    judge_case,
    lay_out,
    make_noise,
    make_tokens,
    noise_for,
    open_buffer,
    poison,
    run_world,
    start_combine,
    start_dispatch,
    turned,
)

# All ways of calling combine give the same bits.


class Call(NamedTuple):
    """What a combine is made of: rows in both layouts, NaN where there is none."""

    buffer: Buffer
    slab: torch.Tensor
    compact: torch.Tensor
    topk_idx: torch.Tensor
    weights: torch.Tensor
    handle: tuple

    def __call__(self, x, *, handle=None, **rest) -> torch.Tensor:
        given = self.handle if handle is None else handle
        return self.buffer.low_latency_combine(x, self.topk_idx, self.weights, given, **rest)[0]


def with_cloned_handle(call):
    """The handle as whoever stored its tensors gives it back."""
    cloned = [part.clone() if isinstance(part, torch.Tensor) else part for part in call.handle]
    return call(call.slab, handle=tuple(cloned))


def with_handle_cloned_on_one_rank(call):
    return with_cloned_handle(call) if call.buffer.rank == CULPRIT else call(call.slab)


def with_a_hook(call):
    out = torch.full((len(call.topk_idx), call.slab.shape[2]), torch.nan).bfloat16()
    arguments = (call.slab, call.topk_idx, call.weights, call.handle)
    combined, _, hook = call.buffer.low_latency_combine(*arguments, return_recv_hook=True, out=out)
    for part in arguments[:3]:
        part.zero_()  # the rows are on their way already
    hook()
    hook()
    assert combined is out
    return out


def with_an_event(call):
    combined, event, hook = call.buffer.low_latency_combine(
        call.slab, call.topk_idx, call.weights, call.handle, async_finish=True
    )
    assert event.event is not None
    assert hook is None
    event.current_stream_wait()
    return combined


def into_out(call):
    out = torch.full((len(call.topk_idx), call.slab.shape[2]), torch.nan).bfloat16()
    assert call(call.compact, out=out) is out
    return out


def into_columns(call):
    out = torch.full((call.slab.shape[2], len(call.topk_idx)), torch.nan).bfloat16().t()
    assert call(call.slab, out=out) is out
    return out.contiguous()


def without_a_copy(call):
    rows = call.buffer.get_next_low_latency_combine_buffer(call.handle)
    again = call.buffer.get_next_low_latency_combine_buffer(tuple(call.handle)[:5])
    assert rows.data_ptr() == again.data_ptr()
    assert (rows.shape, rows.dtype) == (call.slab.shape, torch.bfloat16)
    rows.copy_(call.slab)
    return call(torch.full_like(call.slab, torch.nan), zero_copy=True)


def with_strides(call):
    turned_round = call._replace(
        topk_idx=call.topk_idx.t().contiguous().t(), weights=call.weights.t().contiguous().t()
    )
    return turned_round(call.slab.transpose(0, 2).contiguous().transpose(0, 2))


def with_gradients(call):
    wanting = call._replace(weights=call.weights.clone().requires_grad_())
    combined = wanting(call.compact.clone().requires_grad_())
    assert not combined.requires_grad
    return combined


def in_inference_mode(call):
    with torch.inference_mode():
        return call(call.slab).clone()


def by_position(call):
    arguments = (call.slab, call.topk_idx, call.weights, call.handle)
    rest = (False, False, False, False, None, None)
    return call.buffer.low_latency_combine(*arguments, *rest)[0]


def without_padding(call):
    return call(call.compact[: int(call.handle[5].sum())])


COMBINE_WAYS = {
    "slab": lambda call: call(call.slab),
    "compact": lambda call: call(call.compact),
    "compact without padding": without_padding,
    "five parts": lambda call: call(call.slab, handle=call.handle[:5]),
    "plain tuple": lambda call: call(call.compact, handle=tuple(call.handle)),
    "list": lambda call: call(call.slab, handle=list(call.handle)),
    "cloned handle": with_cloned_handle,
    "event": with_an_event,
    "out": into_out,
    "out in columns": into_columns,
    "zero copy": without_a_copy,
    "strides": with_strides,
    "gradients": with_gradients,
    "inference mode": in_inference_mode,
    "by position": by_position,
    "hook": with_a_hook,  # overwrites its arguments, so it is the last
}
UNWEIGHTED_WAYS = {"handle cloned on one rank": with_handle_cloned_on_one_rank}
"""Where dispatch was given no weights, since a copy of a handle does not know them."""


def combine_in_all_ways(world, transport, routing, form, bring_weights):
    with open_buffer(world, transport, **format_of(form)) as buffer:
        topk_idx = routing.topk_idxs[buffer.rank].clone()
        weights = give_weights(topk_idx, buffer.rank)
        rest, ways = {}, {**UNWEIGHTED_WAYS, **COMBINE_WAYS}
        if bring_weights:
            rest, ways = {"topk_weights": weights.clone()}, COMBINE_WAYS
        got = dispatch(buffer, routing, form, **rest)
        slab, compact = (
            noise_for(buffer, got, replace(form, rows=rows), routing)
            for rows in ("slab", "compact")
        )
        call = Call(buffer, slab, compact, topk_idx, weights, got.handle)
        return {name: way(call) for name, way in ways.items()}


@pytest.mark.parametrize("case", ["duplicates", "slots_empty"])
@pytest.mark.parametrize("bring_weights", [False, True])
@pytest.mark.parametrize("rows", ["slab", "compact"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_all_ways_of_calling_combine_give_the_same(pool, transport, rows, bring_weights, case):
    routing = draw(case, 3)
    form = form_for(routing, "fp8", rows)
    job = (combine_in_all_ways, routing, form, bring_weights)
    got = run_world(pool, transport, *job, num_ranks=3)
    right = judge_case(case, 3, "fp8")
    assert not sum_faults([each["slab"] for each in got], right.noise)
    for each in got:
        assert len(each) == len(COMBINE_WAYS) + (not bring_weights)
        for name, combined in each.items():
            assert not difference(combined, each["slab"]), name


# Switches of fp8 say nothing where rows are to be bf16.

SWITCHES = [
    {},
    {"round_scale": True},
    {"use_ue8m0": True},
    {"round_scale": True, "use_ue8m0": True},
]


def dispatch_in_bf16(world, transport, routing, form):
    """In buffers of all formats every rank sets all switches, another one in each call."""
    results = []
    for name in ("fp8", "int8", "bf16"):
        with open_buffer(world, transport, low_latency_format=name) as buffer:
            for turn in range(len(SWITCHES)):
                switches = SWITCHES[(turn + buffer.rank) % len(SWITCHES)]
                results.append(dispatch(buffer, routing, form, **switches))
    return results


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_without_use_fp8_its_switches_say_nothing(pool, transport):
    routing = draw("uneven", 3)
    form = form_for(routing, "bf16")
    everything = run_world(pool, transport, dispatch_in_bf16, routing, form, num_ranks=3)
    right = judge_case("uneven", 3, "bf16").slabs
    for slabs in zip(*everything, strict=True):
        assert not slab_faults(slabs, right, form, routing)


# Statistics.


def count_rows(world, transport, routing, form):
    """What is counted by a call, before a hook and after it, and what there is before it."""
    with open_buffer(world, transport, **format_of(form)) as buffer:
        counted = torch.arange(routing.num_experts // buffer.group_size, dtype=torch.int32)
        stats, seen = {"cumulative_local_expert_recv_stats": counted}, []
        dispatch(buffer, routing, form, **stats)
        seen.append(counted.clone())
        got, hook = start_dispatch(buffer, routing, form, return_recv_hook=True, **stats)
        seen.append(counted.clone())
        is_empty = bool(got.x.isnan().all()) and not got.recv_count.any()
        hook()
        return is_empty, got.recv_count, [*seen, counted]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_rows_are_received_and_counted_by_the_hook(pool, transport):
    routing = draw("uneven", 3)
    form = form_for(routing, "bf16", "compact")
    right = judge_case("uneven", 3, "bf16").slabs
    results = run_world(pool, transport, count_rows, routing, form, num_ranks=3)
    for (is_empty, count, seen), each in zip(results, right, strict=True):
        assert is_empty
        assert count.tolist() == each.recv_count
        start = torch.arange(4, dtype=torch.int32)
        for times, counted in zip((1, 1, 2), seen, strict=True):
            assert not difference(counted, start + times * count)


SLOW, NAP_S, BEFORE = 1, 0.06, 1000
"""The rank that is late, by how much, and what the statistics hold already."""


def measure_waits(world, transport, routing, form):
    """What every call adds to its statistics, of both shapes, when one rank comes late."""
    found = {}
    with open_buffer(world, transport, **format_of(form)) as buffer:
        calls = waiting_calls(buffer, routing, form)
        for (name, call), use_hook in itertools.product(calls.items(), (False, True)):
            num_ranks = buffer.group_size
            for shape in ((num_ranks,), (num_ranks, num_ranks)):
                waits = torch.full(shape, BEFORE, dtype=torch.int64)
                buffer.warmup(0, 1)
                time.sleep(NAP_S if buffer.rank == SLOW else 0)
                call(waits, use_hook)
                found.setdefault(name, []).append(waits - BEFORE)
    return found


def waiting_calls(buffer, routing, form):
    """Each takes the tensor where it counts, and whether to use a hook if it knows hooks."""
    topk_idx = routing.topk_idxs[buffer.rank]
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, routing.num_experts)
    layout = {
        "num_tokens_per_rank": per_rank,
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
    }
    x = make_tokens(buffer.rank, len(topk_idx), form)
    received, *_, handle, _ = buffer.dispatch(x, **layout)
    got = dispatch(buffer, routing, form)
    noise = noise_for(buffer, got, form, routing)
    there, back = "dispatch_wait_recv_cost_stats", "combine_wait_recv_cost_stats"

    return {
        "low-latency dispatch": lambda waits, use_hook: dispatch(
            buffer, routing, form, use_hook=use_hook, **{there: waits}
        ),
        "low-latency combine": lambda waits, use_hook: combine(
            buffer, noise, routing, got.handle, use_hook=use_hook, **{back: waits}
        ),
        "dispatch": lambda waits, _: buffer.dispatch(x, **layout, **{there: waits}),
        "cached dispatch": lambda waits, _: buffer.dispatch(x, handle=handle, **{there: waits}),
        "combine": lambda waits, _: buffer.combine(received, handle, **{back: waits}),
    }


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_late_rank_is_waited_for_and_waits_for_nobody(pool, transport):
    routing, nap_us = draw("uniform", 3), NAP_S * 1e6
    form = form_for(routing, "bf16")
    everything = run_world(pool, transport, measure_waits, routing, form, num_ranks=3)
    for rank, found in enumerate(everything):
        for name, waits in found.items():
            of_others = [each[torch.arange(3) != rank] for each in waits if each.dim() == 2]
            assert not torch.cat(of_others).any(), "the rows of other ranks are theirs"
            vectors = torch.stack([each for each in waits if each.dim() == 1])
            matrices = torch.stack([each[rank] for each in waits if each.dim() == 2])
            for rows in (vectors, matrices):  # ranks may be late by chance, but not every time
                assert (rows >= 0).all()
                is_waited_for = [rank != SLOW and peer == SLOW for peer in range(3)]
                for peer, waited in enumerate(is_waited_for):
                    seen = rows[:, peer].max() if waited else rows[:, peer].min()
                    assert (seen > nap_us / 2) == waited, f"rank {rank}, {name}: {rows}"


def test_waits_of_high_throughput_calls_are_asked_for_by_name():
    for method in (Buffer.dispatch, Buffer.combine):
        *_, last = inspect.signature(method).parameters.values()
        assert last.kind is inspect.Parameter.KEYWORD_ONLY
        assert last.name == f"{method.__name__}_wait_recv_cost_stats"


# Two micro-batches.


def overlap(world, transport, batches, how):
    """Two calls in flight at a time, there and back, their receiving halves the other way round."""
    with (
        open_buffer(world, transport, low_latency_format="int8") as buffer,
        ThreadPoolExecutor(1) as helper,
    ):
        poison(buffer)
        started = []
        for routing, form in batches:
            started.append(start_dispatch(buffer, routing, form, return_recv_hook=True))
        run_both(started, how, helper, buffer.rank)
        back = []
        for (routing, form), (got, _) in zip(batches, started, strict=True):
            noise = noise_for(buffer, got, turned(form), routing)
            back.append(start_combine(buffer, noise, routing, got.handle, return_recv_hook=True))
        run_both(back, how, helper, buffer.rank)
    return [(got, combined) for (got, _), (combined, _) in zip(started, back, strict=True)]


def run_both(started, how, helper, rank):
    """In the other order, on some ranks only, or in another thread, at the same time even."""
    hooks = [hook for _, hook in started]
    if how == "in order on even ranks" and rank % 2 == 0:
        hooks.reverse()
    if how == "at the same time":
        other = helper.submit(hooks[0])
        hooks[1]()
        other.result()
        return
    for hook in reversed(hooks):
        if how == "by another thread":
            helper.submit(hook).result()
        else:
            hook()


HOWS = ["the other way round", "in order on even ranks", "by another thread", "at the same time"]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_two_batches_pass_through_each_other(pool, transport, how):
    cases = (("uneven", "int8"), ("slots_empty", "bf16"))
    routings = [draw(case, 4) for case, _ in cases]
    batches = [
        (routing, form_for(routing, name))
        for routing, (_, name) in zip(routings, cases, strict=True)
    ]
    everything = run_world(pool, transport, overlap, batches, how)
    for index, ((routing, form), case) in enumerate(zip(batches, cases, strict=True)):
        slabs, combined = zip(*(each[index] for each in everything), strict=True)
        right = judge_case(case[0], 4, case[1])
        assert not slab_faults(slabs, right.slabs, form, routing)
        assert not sum_faults(combined, right.noise)


def receive_beside_the_next_call(world, transport, batches):
    """A thread receives one batch while the main thread sends the next, there and back."""
    results = []
    with (
        open_buffer(world, transport) as buffer,
        ThreadPoolExecutor(1) as helper,
    ):
        poison(buffer)
        for routing, form in batches:
            got, hook = start_dispatch(buffer, routing, form, return_recv_hook=True)
            receiving = helper.submit(hook)
            dispatch(buffer, routing, form, use_hook=True)
            receiving.result()
            noise = noise_for(buffer, got, form, routing)
            combined, hook = start_combine(
                buffer, noise, routing, got.handle, return_recv_hook=True
            )
            receiving = helper.submit(hook)
            combine(buffer, noise, routing, got.handle, use_hook=True)
            receiving.result()
            results.append((got, combined))
    return results


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_thread_receives_while_another_sends(pool, transport):
    cases = ["uneven", "uniform", "duplicates", "one_rank_empty"]
    batches = [(draw(case, 4), form_for(draw(case, 4), "fp8")) for case in cases]
    everything = run_world(pool, transport, receive_beside_the_next_call, batches)
    for index, (case, (routing, form)) in enumerate(zip(cases, batches, strict=True)):
        slabs, combined = zip(*(each[index] for each in everything), strict=True)
        right = judge_case(case, 4, "fp8")
        assert not slab_faults(slabs, right.slabs, form, routing)
        assert not sum_faults(combined, right.noise)


def change_the_number_of_slots(world, transport, routing, forms):
    """On a buffer that begins with nothing: it grows while rows are in flight, and then is kept."""
    results = []
    with open_buffer(world, transport, num_slots=1, hidden=1) as buffer:
        for small, large in itertools.pairwise(forms):
            first, receive_first = start_dispatch(buffer, routing, small, return_recv_hook=True)
            second, receive_second = start_dispatch(buffer, routing, large, return_recv_hook=True)
            receive_first()
            receive_second()
            noise = noise_for(buffer, first, small, routing)
            results.append((first, second, combine(buffer, noise, routing, first.handle)))
    return results  # of a buffer that is gone


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_call_may_have_its_own_number_of_slots(pool, transport):
    routing = draw("uneven", 4)
    forms = [Form("bf16", "slab", num_slots, 37) for num_slots in (42, 300, 43, 77, 1000)]
    everything = run_world(pool, transport, change_the_number_of_slots, routing, forms)
    right = judge_case("uneven", 4, "bf16")
    for index, (small, large) in enumerate(itertools.pairwise(forms)):
        first, second, combined = zip(*(each[index] for each in everything), strict=True)
        assert not slab_faults(first, right.slabs, small, routing)
        assert not slab_faults(second, right.slabs, large, routing)
        assert not sum_faults(combined, right.noise)


# Callers with habits of their own.


def go_with_odd_habits(world, transport, routing, forms):
    """The default dtype is bf16 and the default device another; tokens have strides."""
    rank, num_local = world.rank(), routing.num_experts // world.size()
    topk_idx = routing.topk_idxs[rank]
    weights, results = give_weights(topk_idx, rank), []
    origins = oracle.arrivals(routing.topk_idxs, num_experts=routing.num_experts)
    counts = [len(each) for each in origins[rank * num_local : (rank + 1) * num_local]]
    for form in forms:
        x = make_tokens(rank, len(topk_idx), form).t().contiguous().t().requires_grad_()
        noise = lay_out(make_noise(rank, counts, form.hidden), form, routing)
        with (
            torch.inference_mode(mode=rank == 1),
            deviating_defaults(),
            open_buffer(world, transport, **format_of(form)) as buffer,
        ):
            rest = {"topk_weights": weights.requires_grad_(), "async_finish": True}
            got = dispatch(buffer, routing, form, x=x, use_hook=rank == 0, **rest)
            sums = [
                buffer.low_latency_combine(noise, topk_idx, weights, got.handle, use_logfmt=log)[0]
                for log in (False, True)
            ]
            results.append((got, *sums))
            assert not any(part.requires_grad for part in (*sums, *got[0]))
    return results


@contextlib.contextmanager
def deviating_defaults():
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("transport", ["one_sided", "collective"])
def test_defaults_strides_and_gradients_of_the_caller_do_not_matter(pool, transport):
    case, routing = "slots_empty", draw("slots_empty", 3)
    plans = (("int8", "compact"), ("fp8_ue8m0", "slab"), ("fp8", "compact"))
    forms = [form_for(routing, *plan) for plan in plans]
    everything = run_world(pool, transport, go_with_odd_habits, routing, forms, num_ranks=3)
    for index, form in enumerate(forms):
        slabs, combined, in_ten_bits = zip(*(each[index] for each in everything), strict=True)
        right = judge_case(case, 3, form.name)
        assert not slab_faults(slabs, right.slabs, form, routing)
        assert not sum_faults(combined, right.noise)
        assert not sum_faults(in_ten_bits, right.noise, use_logfmt=True)
