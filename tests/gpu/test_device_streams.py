"""Calls among the caller's streams: what they wait for, what waits for them, and what stays alive.

Tokens become what they are on a stream that is busy for a while, as long as each rank likes, and
results are used on another one. A call that did not wait would send, or return, what was there
before: NaN. What a caller lets go of is written over at once by whoever gets its memory.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch

from crossdock import Buffer, EventHandle, EventOverlap, reference
from crossdock import reference_low_latency as oracle
from crossdock.cases import Routing, choose, origin_rows
from tests.gpu.adapter import NEEDS_GPUS, spin
from tests.worlds.checks import Received, Returned, combine_faults, dispatch_faults
from tests.worlds.low_latency_checks import Form, Slabs, exact_sums, slab_faults, sum_faults

pytestmark = NEEDS_GPUS

NUM_ROUNDS, HIDDEN, NUM_TOPK, NUM_LOCAL, MOST = 24, 512, 3, 4, 48
LONGEST_US = 2000


def draw(index: int, num_ranks: int) -> Routing:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(index)
    lengths = torch.randint(0, MOST + 1, (num_ranks,), generator=generator).tolist()
    experts = NUM_LOCAL * num_ranks
    idxs = [choose(length, experts, NUM_TOPK, generator=generator) for length in lengths]
    return Routing(idxs, experts)


def tokens_of(rank: int, index: int, routing: Routing) -> torch.Tensor:
    """Not so large that the sums of all rows of a round may be rounded the same way, and far."""
    num_tokens = len(routing.topk_idxs[rank])
    return origin_rows(rank + 8 * (index % 8), num_tokens, HIDDEN, dtype=torch.bfloat16)


def experts(rows: torch.Tensor, rank: int) -> torch.Tensor:
    """Exact in bf16, and another one on each rank."""
    return rows * -(2.0**rank)


class Lane:
    """A stream of the caller's, and what is slow on it."""

    def __init__(self, seed: int) -> None:
        self.stream = torch.cuda.Stream()
        self.whims = random.Random(seed)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """The body's work comes behind a delay."""
        with torch.cuda.stream(self.stream):
            spin(self.whims.random() * LONGEST_US)
            yield

    def make(self, rows: torch.Tensor) -> tuple[torch.Tensor, EventOverlap]:
        """A tensor that is NaN until the stream gets there, and the point where it did."""
        there = rows.cuda()
        made = torch.full_like(there, torch.nan)
        torch.cuda.synchronize()
        with self.busy():
            made.copy_(there)
            return made, EventOverlap(EventHandle())


class Round(NamedTuple):
    """What one rank does in a round: its calls, in a way of its own."""

    buffer: Buffer
    makers: Lane
    users: Lane
    x: torch.Tensor
    routing: Routing

    @property
    def topk_idx(self) -> torch.Tensor:
        return self.routing.topk_idxs[self.buffer.rank].cuda()

    def layout(self) -> dict[str, torch.Tensor]:
        layout = self.buffer.get_dispatch_layout(self.topk_idx, self.routing.num_experts)
        names = {"is_token_in_rank": layout[3], "num_tokens_per_expert": layout[2]}
        return {**names, "topk_idx": self.topk_idx}


def on_the_current_stream(given: Round) -> Any:
    """Everything on one stream, which is not the default one."""
    layout = given.layout()
    x, _ = given.makers.make(given.x)
    with torch.cuda.stream(given.makers.stream):
        made = given.buffer.dispatch(x, **layout)
        answers = experts(made[0], given.buffer.rank)
        back, _, _ = given.buffer.combine(answers, made[4])
    torch.cuda.current_stream().wait_stream(given.makers.stream)
    return made, back


def after_an_event(given: Round, **rest: bool) -> Any:
    """The call is made on a stream that knows nothing of x, and used on another one still."""
    layout = given.layout()
    x, previous = given.makers.make(given.x)
    made = given.buffer.dispatch(x, **layout, previous_event=previous, async_finish=True, **rest)
    with given.users.busy():
        made[5].current_stream_wait(release_handle=True)
        answers = experts(made[0], given.buffer.rank)
        ready = EventOverlap(EventHandle())
    del x, layout
    write_over()
    back, _, event = given.buffer.combine(
        answers, made[4], previous_event=ready, async_finish=True, **rest
    )
    event.current_stream_wait(release_handle=True)
    del answers
    with torch.cuda.stream(given.users.stream):
        write_over()
    return made, back


def on_the_comm_stream(given: Round) -> Any:
    """Results are allocated there, and used here."""
    return after_an_event(given, allocate_on_comm_stream=True)


def after_the_current_stream(given: Round) -> Any:
    """Without a previous event a call comes after all that the current stream has been given."""
    layout = given.layout()
    x, _ = given.makers.make(given.x)
    with torch.cuda.stream(given.makers.stream):
        made = given.buffer.dispatch(x, **layout, async_finish=True)
        made[5].current_stream_wait()
        answers = experts(made[0], given.buffer.rank)
        back, _, event = given.buffer.combine(answers, made[4], async_finish=True)
    event.current_stream_wait()
    return made, back


def without_waiting_in_between(given: Round) -> Any:
    """Two calls of a buffer come one after the other, whatever stream they are made on."""
    layout = given.layout()
    x, previous = given.makers.make(given.x)
    first = given.buffer.dispatch(x, **layout, previous_event=previous, async_finish=True)
    again, *_ = given.buffer.dispatch(x, handle=first[4], previous_event=first[5])
    answers = experts(again, given.buffer.rank)
    back, _, _ = given.buffer.combine(answers, first[4])
    first[5].current_stream_wait()
    return first, back


def write_over() -> None:
    """Whoever asks for memory now gets what the caller has dropped, and writes to it at once."""
    for num_bytes in 4 * [2 * MOST * HIDDEN, 8 * MOST * NUM_TOPK, 4 * MOST, MOST]:
        torch.full((num_bytes,), 0x7F, dtype=torch.uint8, device="cuda")


WAYS = {
    way.__name__: way
    for way in (
        on_the_current_stream,
        after_an_event,
        on_the_comm_stream,
        after_the_current_stream,
        without_waiting_in_between,
    )
}


def go(group: Any, name: str) -> list[Any]:
    results, rank = [], group.rank()
    with Buffer(group, transport="device", timeout_s=20, first_call_timeout_s=300) as buffer:
        lanes = Lane(2 * rank), Lane(2 * rank + 1)
        for index in range(NUM_ROUNDS):
            routing = draw(index, group.size())
            given = Round(buffer, *lanes, tokens_of(rank, index, routing), routing)
            made, back = WAYS[name](given)
            made = [part.cpu() if isinstance(part, torch.Tensor) else part for part in made[:4]]
            results.append((made, back.cpu()))
            torch.cuda.synchronize()
    return results


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_calls_wait_for_what_they_are_told_and_are_waited_for(
    pool: Any, num_ranks: int, name: str
) -> None:
    everything = pool.run(go, name, num_ranks=num_ranks)
    for index in range(NUM_ROUNDS):
        routing = draw(index, num_ranks)
        xs = [tokens_of(rank, index, routing) for rank in range(num_ranks)]
        right = reference.dispatch(xs, routing.topk_idxs, num_experts=routing.num_experts)
        made, back = zip(*(each[index] for each in everything), strict=True)
        got = [
            Received(x, idx, weights, counts, *wanted[4:])
            for (x, idx, weights, counts), wanted in zip(made, right, strict=True)
        ]
        assert not dispatch_faults(got, right), f"round {index}"
        answers = [experts(each.recv_x, rank) for rank, each in enumerate(right)]
        exact = reference.combine(answers, routing.topk_idxs, routing.num_experts)
        num = [
            reference.layout(idx, routing.num_experts, num_ranks).is_token_in_rank.sum(1)
            for idx in routing.topk_idxs
        ]
        assert not combine_faults([Returned(each, None) for each in back], exact, num)


# Low latency.


def low_latency(group: Any, use_hook: bool) -> list[Any]:
    """x becomes ready late; hooks run on a stream that the sending half knows nothing of."""
    results, rank = [], group.rank()
    with Buffer(group, transport="device", timeout_s=20, first_call_timeout_s=300) as buffer:
        makers, users = Lane(2 * rank), Lane(2 * rank + 1)
        for index in range(NUM_ROUNDS):
            routing = draw(index, group.size())
            idx = routing.topk_idxs[rank].cuda()
            weights = torch.ones(idx.shape, device="cuda")
            x, _ = makers.make(tokens_of(rank, index, routing))
            given = {"return_recv_hook": use_hook, "async_finish": not use_hook}
            with torch.cuda.stream(makers.stream):
                rows, count, handle, event, hook = buffer.low_latency_dispatch(
                    x, idx, MOST, routing.num_experts, use_fp8=False, **given
                )
            with users.busy():
                receive(hook, event, makers.stream)
                answers = experts(rows, rank)
                back, event, hook = buffer.low_latency_combine(
                    answers, idx, weights, handle, **given
                )
                receive(hook, event, makers.stream)
                parts = [each.cpu() if isinstance(each, torch.Tensor) else each for each in handle]
                results.append((Slabs(rows.cpu(), count.cpu(), tuple(parts)), back.cpu()))
            torch.cuda.synchronize()
    return results


def receive(hook: Callable[[], None] | None, event: EventOverlap, sender: Any) -> None:
    """On the current stream."""
    if hook is None:
        event.current_stream_wait()
    else:
        torch.cuda.current_stream().wait_stream(sender)
        hook()


@pytest.mark.parametrize("use_hook", [False, True])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_low_latency_calls_do_too(pool: Any, num_ranks: int, use_hook: bool) -> None:
    everything = pool.run(low_latency, use_hook, num_ranks=num_ranks)
    form = Form("bf16", "slab", MOST, HIDDEN)
    for index in range(NUM_ROUNDS):
        routing = draw(index, num_ranks)
        xs = [tokens_of(rank, index, routing) for rank in range(num_ranks)]
        right = oracle.dispatch(
            xs, routing.topk_idxs, num_experts=routing.num_experts, format="bf16"
        )
        slabs, back = zip(*(each[index] for each in everything), strict=True)
        assert not slab_faults(slabs, right, form, routing), f"round {index}"
        answers = [[experts(rows, rank) for rows in each.rows] for rank, each in enumerate(right)]
        weights = [torch.ones(idx.shape) for idx in routing.topk_idxs]
        assert not sum_faults(back, exact_sums(answers, routing, weights))


# Sizes that the host has not asked for do not disturb those that it waits for.


def mix_padded_and_exact(group: Any) -> list[list[int]]:
    """The GPU is far behind the host when an exact call follows a padded one."""
    wrong, rank = [], group.rank()
    with Buffer(group, transport="device", timeout_s=20, first_call_timeout_s=300) as buffer:
        buffer.warmup(MOST, HIDDEN)
        for index in range(NUM_ROUNDS):
            small, large = draw(2 * index, group.size()), draw(2 * index + 1, group.size())
            given = []
            for routing in (small, large):
                idx = routing.topk_idxs[rank].cuda()
                layout = buffer.get_dispatch_layout(idx, routing.num_experts)
                names = {"is_token_in_rank": layout[3], "num_tokens_per_expert": layout[2]}
                x = tokens_of(rank, index, routing).cuda()
                given.append({"x": x, **names, "topk_idx": idx})
            torch.cuda.synchronize()
            spin(LONGEST_US)
            buffer.dispatch(**given[0], num_worst_tokens=MOST * group.size())
            x, *_, handle, _ = buffer.dispatch(**given[1])
            num_rows = int(handle[0][-1, rank])
            wrong += [] if len(x) == num_rows else [[index, len(x), num_rows]]
            torch.cuda.synchronize()
    return wrong


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_an_exact_call_behind_a_padded_one_has_sizes_of_its_own(pool: Any, num_ranks: int) -> None:
    assert pool.run(mix_padded_and_exact, num_ranks=num_ranks) == [[]] * num_ranks
