"""Low-latency calls that go wrong: what every rank is told, and that it does no harm.

A mistake is made by all ranks, or by one, and then the others hear of it. Afterwards the buffer
works as before, which a trip there and back shows; only a failure between the two halves of a call
is final.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from crossdock import (
    ConfigError,
    HandleError,
    PeerRefusedError,
    PeerTimeoutError,
    RankMismatchError,
    TransportError,
)
from crossdock.errors import CrossdockError, ShapeError
from crossdock.transports.loopback import LoopbackComm
from tests.worlds.low_latency_checks import slab_faults, sum_faults
from tests.worlds.low_latency_worlds import (
    CULPRIT,
    TRANSPORTS,
    combine,
    dispatch,
    draw,
    form_for,
    give_weights,
    go_once,
    judge_case,
    make_tokens,
    noise_for,
    open_buffer,
    poison,
    run_world,
    start_combine,
    start_dispatch,
    trip_faults,
)

# Wrong arguments.


class Mistake(NamedTuple):
    """Wrong arguments, in place of right ones, and what is said of them."""

    error: type[CrossdockError]
    text: str
    wrong: Callable[[dict], dict]


DISPATCH_MISTAKES = {
    "more tokens than slots": Mistake(
        ShapeError,
        "num_max_dispatch_tokens_per_rank.*15.*16",
        lambda _: {"num_max_dispatch_tokens_per_rank": 15},
    ),
    "experts that do not divide": Mistake(
        ShapeError, "num_experts.*13.*3", lambda _: {"num_experts": 13}
    ),
    "a width without blocks": Mistake(
        ShapeError, "hidden.*200.*128", lambda given: {"x": given["x"][:, :200].contiguous()}
    ),
    "a width without groups of blocks": Mistake(
        ShapeError, "hidden.*256.*512", lambda _: {"round_scale": True, "use_ue8m0": True}
    ),
    "exponents without powers of two": Mistake(
        ConfigError, "use_ue8m0 needs round_scale", lambda _: {"use_ue8m0": True}
    ),
    "tokens in float32": Mistake(
        ShapeError, "x.*float32.*bfloat16", lambda given: {"x": given["x"].float()}
    ),
    "tokens in three dimensions": Mistake(
        ShapeError, "x.*bfloat16", lambda given: {"x": given["x"][None]}
    ),
    "choices in int32": Mistake(
        ShapeError, "topk_idx.*int32.*int64", lambda given: {"topk_idx": given["topk_idx"].int()}
    ),
    "too few choices": Mistake(
        ShapeError, "topk_idx", lambda given: {"topk_idx": given["topk_idx"][1:]}
    ),
    "an expert that is not there": Mistake(
        ShapeError, "topk_idx.*12", lambda given: {"topk_idx": given["topk_idx"] + 12}
    ),
    "weights in bf16": Mistake(
        ShapeError,
        "topk_weights.*bfloat16.*float32",
        lambda given: {"topk_weights": torch.ones(given["topk_idx"].shape).bfloat16()},
    ),
    "statistics in int64": Mistake(
        ShapeError,
        "cumulative_local_expert_recv_stats.*int64.*int32",
        lambda _: {"cumulative_local_expert_recv_stats": torch.zeros(4, dtype=torch.int64)},
    ),
    "statistics of all experts": Mistake(
        ShapeError,
        "cumulative_local_expert_recv_stats.*12.*4",
        lambda _: {"cumulative_local_expert_recv_stats": torch.zeros(12, dtype=torch.int32)},
    ),
    "waits in int32": Mistake(
        ShapeError,
        "dispatch_wait_recv_cost_stats.*int32.*int64",
        lambda _: {"dispatch_wait_recv_cost_stats": torch.zeros(3, dtype=torch.int32)},
    ),
    "waits of other ranks": Mistake(
        ShapeError,
        "dispatch_wait_recv_cost_stats.*2.*3",
        lambda _: {"dispatch_wait_recv_cost_stats": torch.zeros((2, 3), dtype=torch.int64)},
    ),
}

COMBINE_MISTAKES = {
    "a handle of the other mode": Mistake(
        HandleError, "high-throughput", lambda given: {"handle": given["other"]}
    ),
    "half a handle": Mistake(
        HandleError, "5 or 6 parts", lambda given: {"handle": given["handle"][:4]}
    ),
    "a handle of another group": Mistake(
        HandleError,
        "layout_range",
        lambda given: {"handle": (*given["handle"][:4], given["handle"][4] * 2)},
    ),
    "a handle for other slots": Mistake(
        HandleError,
        "src_info",
        lambda given: {"handle": (*given["handle"][:2], 33, *given["handle"][3:])},
    ),
    "rows in float32": Mistake(
        ShapeError, "x.*float32.*bfloat16", lambda given: {"x": given["x"].float()}
    ),
    "rows of another width": Mistake(
        ShapeError, "x.*255.*256", lambda given: {"x": given["x"][:, :, :255]}
    ),
    "slabs too short": Mistake(ShapeError, "x", lambda given: {"x": given["x"][:, 1:]}),
    "too few compact rows": Mistake(
        ShapeError, "rows or more", lambda given: {"x": given["x"][0, :9]}
    ),
    "choices in int32": Mistake(
        ShapeError, "topk_idx.*int32.*int64", lambda given: {"topk_idx": given["topk_idx"].int()}
    ),
    "weights in bf16": Mistake(
        ShapeError,
        "topk_weights.*bfloat16.*float32",
        lambda given: {"topk_weights": given["topk_weights"].bfloat16()},
    ),
    "too few weights": Mistake(
        ShapeError, "topk_weights", lambda given: {"topk_weights": given["topk_weights"][:, 1:]}
    ),
    "out in float32": Mistake(
        ShapeError, "out.*float32.*bfloat16", lambda _: {"out": torch.zeros(16, 256)}
    ),
    "out for fewer tokens": Mistake(
        ShapeError, "out.*15.*16", lambda _: {"out": torch.zeros(15, 256).bfloat16()}
    ),
    "a buffer nobody asked for": Mistake(
        HandleError, "combine buffer", lambda _: {"zero_copy": True}
    ),
    "waits in int32": Mistake(
        ShapeError,
        "combine_wait_recv_cost_stats.*int32.*int64",
        lambda _: {"combine_wait_recv_cost_stats": torch.zeros(3, dtype=torch.int32)},
    ),
}

WEIGHTED_MISTAKES = {
    "other weights than before": Mistake(
        ConfigError,
        "topk_weights.*dispatch",
        lambda given: {"topk_weights": given["topk_weights"] + 1},
    ),
}
"""Of a combine whose weights were given to dispatch."""

SWITCH_MISTAKES = {
    "powers of two": Mistake(ConfigError, "round_scale.*fp8", lambda _: {"round_scale": True}),
    "exponents": Mistake(
        ConfigError, "use_ue8m0.*fp8", lambda _: {"round_scale": True, "use_ue8m0": True}
    ),
}
"""Of a dispatch in a buffer whose format is not fp8."""


def make_mistakes(world, transport, routing, form, culprits):
    """What every rank is told, mistake by mistake, and a trip at the end."""
    with open_buffer(world, transport) as buffer:
        rank = buffer.rank
        tokens = right_tokens(rank, routing, form)
        told = try_mistakes(
            buffer.low_latency_dispatch, tokens, DISPATCH_MISTAKES, rank in culprits
        )
        topk_idx = routing.topk_idxs[rank]
        weights = give_weights(topk_idx, rank)
        for mistakes, rest in (
            (COMBINE_MISTAKES, {}),
            (WEIGHTED_MISTAKES, {"topk_weights": weights.clone()}),
        ):
            got = dispatch(buffer, routing, form, **rest)
            given = {
                "x": noise_for(buffer, got, form, routing),
                "topk_idx": topk_idx,
                "topk_weights": weights,
                "handle": got.handle,
            }
            told += try_mistakes(buffer.low_latency_combine, given, mistakes, rank in culprits)
        return told, go_once(buffer, routing, form)


def right_tokens(rank, routing, form):
    """The arguments of a dispatch."""
    topk_idx = routing.topk_idxs[rank]
    return {
        "x": make_tokens(rank, len(topk_idx), form),
        "topk_idx": topk_idx,
        "num_max_dispatch_tokens_per_rank": form.num_slots,
        "num_experts": routing.num_experts,
    }


def try_mistakes(method, given, mistakes, is_culprit):
    told = []
    for mistake in mistakes.values():
        other = (torch.zeros((3, 3), dtype=torch.int32),) * 6
        wrong = mistake.wrong({**given, "other": other}) if is_culprit else {}
        with pytest.raises(CrossdockError) as caught:
            method(**{**given, **wrong})
        told.append((type(caught.value), str(caught.value)))
    return told


@pytest.mark.parametrize("culprits", [{CULPRIT}, {0, 1, 2}], ids=["one rank", "all ranks"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_mistakes_are_named_and_do_no_harm(pool, transport, culprits):
    routing = draw("uniform", 3)
    form = replace(form_for(routing, "fp8"), num_slots=20)
    job = (make_mistakes, routing, form, culprits)
    everything, trips = zip(*run_world(pool, transport, *job, num_ranks=3), strict=True)
    check_told(everything, culprits, DISPATCH_MISTAKES, COMBINE_MISTAKES, WEIGHTED_MISTAKES)
    assert not trip_faults(trips, judge_case("uniform", 3, "fp8"), routing, form)


def check_told(everything, culprits, *tables):
    """Culprits must be told what was wrong, and the others by whom it was."""
    mistakes = [item for table in tables for item in table.items()]
    for rank, told in enumerate(everything):
        for (name, mistake), (kind, text) in zip(mistakes, told, strict=True):
            if rank in culprits:
                assert kind is mistake.error, f"{name}: {text}"
            else:
                assert kind is PeerRefusedError, f"{name}: {text}"
                assert f"rank {CULPRIT}" in text
            assert re.search(mistake.text, text, re.DOTALL), f"{name}: {text}"


def ask_for_fp8(world, transport, routing, form, culprits):
    """In a buffer whose format is another one."""
    with open_buffer(world, transport, low_latency_format=form.name) as buffer:
        told = try_mistakes(
            buffer.low_latency_dispatch,
            right_tokens(buffer.rank, routing, form),
            SWITCH_MISTAKES,
            buffer.rank in culprits,
        )
        return told, go_once(buffer, routing, form)


@pytest.mark.parametrize("culprits", [{CULPRIT}, {0, 1, 2}], ids=["one rank", "all ranks"])
@pytest.mark.parametrize("name", ["int8", "bf16"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_switches_of_fp8_do_not_go_with_other_formats(pool, transport, name, culprits):
    routing = draw("uniform", 3)
    form = form_for(routing, name)
    job = (ask_for_fp8, routing, form, culprits)
    everything, trips = zip(*run_world(pool, transport, *job, num_ranks=3), strict=True)
    check_told(everything, culprits, SWITCH_MISTAKES)
    assert not trip_faults(trips, judge_case("uniform", 3, name), routing, form)


# A combine before the rows it answers have come.


def combine_too_early(world, transport, routing, form, culprits):
    """Culprits have not run the hook when all combine; all combine again when they have."""
    told = []
    with open_buffer(world, transport) as buffer:
        poison(buffer)
        got, hook = start_dispatch(buffer, routing, form, return_recv_hook=True)
        if buffer.rank not in culprits:
            hook()
        nothing = torch.zeros((*form.shape(routing), form.hidden)).bfloat16()
        for handle in (got.handle, tuple(got.handle), got.handle[:5]):
            with pytest.raises(CrossdockError) as caught:
                combine(buffer, nothing, routing, handle)
            told.append((type(caught.value), str(caught.value)))
        hook()
        noise = noise_for(buffer, got, form, routing)
        combined = combine(buffer, noise, routing, got.handle)
        return told, got, combined, go_once(buffer, routing, form)


@pytest.mark.parametrize("culprits", [{CULPRIT}, {0, 1, 2}], ids=["one rank", "all ranks"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_rows_that_have_not_come_cannot_be_answered(pool, transport, culprits):
    routing = draw("uneven", 3)
    form = form_for(routing, "fp8")
    job = (combine_too_early, routing, form, culprits)
    results = run_world(pool, transport, *job, num_ranks=3)
    told, slabs, combined, trips = zip(*results, strict=True)
    for rank, (kind, text) in ((rank, each) for rank, errors in enumerate(told) for each in errors):
        assert kind is (HandleError if rank in culprits else PeerRefusedError)
        assert "run its hook" in text
        assert rank in culprits or f"rank {CULPRIT}" in text
    right = judge_case("uneven", 3, "fp8")
    assert not slab_faults(slabs, right.slabs, form, routing)
    assert not sum_faults(combined, right.noise)
    assert not trip_faults(trips, right, routing, form)


# How many calls may be in flight, and what ranks must agree on.


def go_too_far(world, transport, routing, form, greedy):
    """Ranks that are `greedy` run no hook before the third call, the others run one.

    Returns what the third dispatch and the third combine raised, and what came of all the others.
    """
    with open_buffer(world, transport) as buffer:
        poison(buffer)
        start = functools.partial(start_dispatch, buffer, routing, form, return_recv_hook=True)
        slabs, first = take_three(start, buffer.rank in greedy)
        noise = noise_for(buffer, slabs[0], form, routing)
        start = functools.partial(
            start_combine, buffer, noise, routing, slabs[0].handle, return_recv_hook=True
        )
        sums, second = take_three(start, buffer.rank in greedy)
        return slabs, sums, [first, second], go_once(buffer, routing, form)


def take_three(start, is_greedy):
    """Starts two calls and tries a third, then receives and tries it again."""
    started = [start(), start()]
    if not is_greedy:
        started[0][1]()
    with pytest.raises(CrossdockError) as caught:
        start()
    for _, hook in reversed(started):
        hook()
    started.append(start())
    started[-1][1]()
    return [result for result, _ in started], (type(caught.value), str(caught.value))


@pytest.mark.parametrize("greedy", [{CULPRIT}, {0, 1, 2}], ids=["one rank", "all ranks"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_third_call_in_flight_is_an_error_and_nothing_else(pool, transport, greedy):
    routing = draw("uneven", 3)
    form = form_for(routing, "fp8")
    job = (go_too_far, routing, form, greedy)
    slabs, sums, told, trips = zip(*run_world(pool, transport, *job, num_ranks=3), strict=True)
    for rank, errors in enumerate(told):
        for name, (kind, text) in zip(("dispatch", "combine"), errors, strict=True):
            assert kind is (HandleError if rank in greedy else PeerRefusedError)
            assert f"2 calls of low latency {name} are in flight" in text
    right = judge_case("uneven", 3, "fp8")
    for index in range(3):
        assert not slab_faults([each[index] for each in slabs], right.slabs, form, routing)
        assert not sum_faults([each[index] for each in sums], right.noise)
    assert not trip_faults(trips, right, routing, form)


DISAGREEMENTS = {
    "num_max_dispatch_tokens_per_rank": lambda given: {"num_max_dispatch_tokens_per_rank": 21},
    "hidden": lambda given: {"x": given["x"][:, :128].contiguous()},
    "num_experts": lambda given: {"num_experts": 15},
    "top-k": lambda given: {"topk_idx": given["topk_idx"][:, :2].contiguous()},
    "dtype of the rows: bf16 and fp8": lambda _: {"use_fp8": False},
    "dtype of the rows: fp8 and fp8 with round_scale": lambda _: {"round_scale": True},
    "presence of topk_idx and topk_weights": lambda given: {
        "topk_weights": torch.ones(given["topk_idx"].shape)
    },
}


def disagree(world, transport, routing, form):
    """One rank calls differently each time, and at last makes another call altogether."""
    told = []
    with open_buffer(world, transport) as buffer:
        given = right_tokens(buffer.rank, routing, form)
        for differing in DISAGREEMENTS.values():
            wrong = differing(given) if buffer.rank == CULPRIT else {}
            with pytest.raises(RankMismatchError) as caught:
                buffer.low_latency_dispatch(**{**given, **wrong})
            told.append(str(caught.value))
        got = dispatch(buffer, routing, form)
        noise = noise_for(buffer, got, form, routing)
        back = functools.partial(combine, buffer, noise, routing, got.handle)
        again = functools.partial(dispatch, buffer, routing, form)
        with pytest.raises(RankMismatchError, match="low latency combine"):
            (again if buffer.rank == CULPRIT else back)()
        return told, go_once(buffer, routing, form)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_disagreements_are_found_before_rows_are_sent(pool, transport):
    routing = draw("uniform", 3)
    form = replace(form_for(routing, "fp8"), num_slots=20)
    everything = run_world(pool, transport, disagree, routing, form, num_ranks=3)
    told, trips = zip(*everything, strict=True)
    for texts in told:
        for name, text in zip(DISAGREEMENTS, texts, strict=True):
            assert name.partition(":")[0] in text
    assert not trip_faults(trips, judge_case("uniform", 3, "fp8"), routing, form)


def mix_up_handles(world, transport, routing, form):
    """Two dispatches alike, and one rank takes the handle of the other, there being weights or not.

    Returns:
        What ranks disagree on, and their values; the sums of both afterwards; and a trip.
    """
    told, sums = [], []
    with open_buffer(world, transport) as buffer:
        weights = give_weights(routing.topk_idxs[buffer.rank], buffer.rank)
        for rest in ({}, {"topk_weights": weights}):
            first, second = (dispatch(buffer, routing, form, **rest) for _ in range(2))
            noise = noise_for(buffer, first, form, routing)
            mine = second if buffer.rank == CULPRIT else first
            with pytest.raises(RankMismatchError) as caught:
                combine(buffer, noise, routing, mine.handle)
            told.append((caught.value.field, caught.value.values))
            sums += [combine(buffer, noise, routing, each.handle) for each in (first, second)]
        return told, sums, go_once(buffer, routing, form)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_handles_of_different_dispatches_do_not_meet(pool, transport):
    routing = draw("uniform", 3)
    form = form_for(routing, "fp8")
    results = run_world(pool, transport, mix_up_handles, routing, form, num_ranks=3)
    told, sums, trips = zip(*results, strict=True)
    assert told[0] == told[1] == told[2]
    for field, values in told[0]:
        assert field == "handle"
        assert values[0] == values[2] != values[CULPRIT]
    right = judge_case("uniform", 3, "fp8")
    for combined in zip(*sums, strict=True):
        assert not sum_faults(combined, right.noise)
    assert not trip_faults(trips, right, routing, form)


def change_their_minds(world, transport, routing, form):
    """Combines with other choices than were dispatched, which is looked at when debugging."""
    with (
        mock.patch.dict(os.environ, {"CROSSDOCK_DEBUG": "1"}),
        open_buffer(world, transport) as buffer,
    ):
        got = dispatch(buffer, routing, form)
        noise = noise_for(buffer, got, form, routing)
        others = [idx.flip(1) for idx in routing.topk_idxs]
        with pytest.raises(ConfigError, match="topk_idx of combine is not that of dispatch"):
            combine(buffer, noise, routing._replace(topk_idxs=others), got.handle)
        return go_once(buffer, routing, form)


@pytest.mark.parametrize("transport", ["one_sided", "collective"])
def test_choices_are_compared_when_debugging(pool, transport):
    routing = draw("uniform", 3)
    form = form_for(routing, "fp8")
    trips = run_world(pool, transport, change_their_minds, routing, form, num_ranks=3)
    assert not trip_faults(trips, judge_case("uniform", 3, "fp8"), routing, form)


# What fails between the two halves of a call is final.


def fail_in_flight(world, transport, routing, form, how):
    """The culprit comes to a dispatch but sends nothing; the others run their hook three times.

    Returns:
        What they were told the first time, and whether it was the same error each time; None on
        the culprit.
    """
    with open_buffer(world, transport, timeout_s=0.5 if how == "is late" else 30) as buffer:
        poison(buffer)
        if buffer.rank == CULPRIT:
            send_nothing = functools.partial(send_nothing_until_met, world, how)
            with (
                mock.patch.object(buffer._session.transport, "send", send_nothing),
                pytest.raises(MemoryError),
            ):
                start_dispatch(buffer, routing, form)
            return None
        _, hook = start_dispatch(buffer, routing, form, return_recv_hook=True)
        meet(world)
        errors = []
        for receive in (hook, hook, hook, lambda: dispatch(buffer, routing, form)):
            with pytest.raises(TransportError) as caught:
                receive()
            errors.append(caught.value)
        if how == "is late":
            meet(world)
        return type(errors[0]), str(errors[0]), [error is errors[0] for error in errors]


def send_nothing_until_met(world, how, call, shipment):
    """Fails when all others are in flight, or only when they have given up."""
    meet(world)
    if how == "is late":
        meet(world)
    raise MemoryError("no room")


def meet(world):
    if isinstance(world, LoopbackComm):
        world.allgather(None)
    else:
        torch.distributed.barrier(group=world)


@pytest.mark.parametrize("how", ["fails", "is late"])
@pytest.mark.parametrize("transport", ["one_sided", "loopback"])
def test_a_hook_that_raised_raises_the_same_again(pool, transport, how):
    routing = draw("uniform", 3)
    job = (fail_in_flight, routing, form_for(routing, "fp8"), how)
    results = run_world(pool, transport, *job, num_ranks=3)
    assert results.pop(CULPRIT) is None
    for kind, text, same in results:
        assert kind is (PeerTimeoutError if how == "is late" else TransportError)
        assert ("rank(s) 1 did not come" if how == "is late" else "MemoryError: no room") in text
        assert same == [True] * 4
