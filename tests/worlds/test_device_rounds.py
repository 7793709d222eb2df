"""Rounds of device calls are counted in 32 bits. Behind the largest number they begin again.

A buffer of a server makes that many calls within days, so here it begins shortly before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from crossdock import Buffer
from crossdock.device.memory import NUM_STATES, Generation, Memory

BEHIND = 2**31 - 3
"""Rounds that every rank has behind it, of every operation."""
NUM_ROUNDS = 8
NUM_RANKS, NUM_TOKENS, HIDDEN = 2, 3, 64
NOT_MANY = (NUM_TOKENS,) * NUM_RANKS


@contextmanager
def open_late(group: Any) -> Iterator[tuple[Buffer, list[Generation]]]:
    """A buffer whose calls have numbers that suffice for two more, and its heaps."""
    replace, made = Memory._replace, []

    def replace_late(memory: Memory, *rest: Any) -> Generation:
        current = replace(memory, *rest)
        current.states.fill_(BEHIND << 32)
        own, begin = current.heap.peer(memory._rank), current.plan.credits
        own[begin : begin + 8 * memory.num_ranks * NUM_STATES].view(torch.int32).fill_(BEHIND)
        memory._transport.topology.allgather(None)
        made.append(current)
        return current

    with (
        mock.patch.object(Memory, "_replace", replace_late),
        Buffer(group, transport="device", timeout_s=20, first_call_timeout_s=20) as buffer,
    ):
        yield buffer, made


def begun_again(heaps: list[Generation]) -> set[int]:
    """The operations whose rounds have: indices of `device.watch.State`."""
    return set((heaps[-1].states < 0).nonzero().flatten().tolist())


def make_tokens(rank: int, nth: int, num: int = NUM_TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that no other rank and no other round has, and one expert for each."""
    tokens = 100.0 * rank + 10 * nth + torch.arange(num) % 10
    x = tokens[:, None].expand(num, HIDDEN).bfloat16().contiguous()
    return x, (torch.arange(num) + rank * nth)[:, None] % NUM_RANKS


def dispatch_and_combine(buffer: Buffer, nth: int, num_tokens: Sequence[int] = NOT_MANY) -> None:
    """A round of high-throughput calls, judged."""
    made = [make_tokens(rank, nth, num) for rank, num in enumerate(num_tokens)]
    x, idx = made[buffer.rank]
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, NUM_RANKS)
    here, _, _, _, handle, _ = buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=idx,
        topk_weights=torch.ones(len(x), 1),
    )
    assert torch.equal(here, torch.cat([x[idx[:, 0] == buffer.rank] for x, idx in made])), nth
    back, _, _ = buffer.combine(here, handle)
    assert torch.equal(back, x), nth


def go_at_low_latency(group: Any) -> set[int]:
    weights = torch.full((NUM_TOKENS, 1), 2.0)
    with open_late(group) as (buffer, heaps):
        for nth in range(NUM_ROUNDS):
            x, idx = make_tokens(buffer.rank, nth)
            slabs, count, handle, *_ = buffer.low_latency_dispatch(
                x, idx, NUM_TOKENS, NUM_RANKS, use_fp8=False
            )
            everywhere = [make_tokens(rank, nth) for rank in range(NUM_RANKS)]
            here = torch.cat([x[idx[:, 0] == buffer.rank] for x, idx in everywhere])
            assert torch.equal(slabs[0, : int(count)], here), nth
            back, *_ = buffer.low_latency_combine(slabs, idx, weights, handle)
            assert torch.equal(back, 2 * x), nth
        return begun_again(heaps)


def go_at_high_throughput(group: Any) -> set[int]:
    with open_late(group) as (buffer, heaps):
        for nth in range(NUM_ROUNDS):
            dispatch_and_combine(buffer, nth)
        return begun_again(heaps)


def go_back_to_the_old_heap(group: Any) -> None:
    """As a replay of a graph does, which is part of a heap that the buffer has left since."""
    with Buffer(group, transport="device", timeout_s=5, first_call_timeout_s=5) as buffer:
        dispatch_and_combine(buffer, nth=0)
        memory = buffer._low_latency._engine._memory
        old = memory.current
        dispatch_and_combine(buffer, nth=1, num_tokens=[10 * NUM_TOKENS, NUM_TOKENS])
        assert memory.current is not old
        memory.current = old
        for nth in range(2, 5):
            dispatch_and_combine(buffer, nth=nth)


def test_who_had_no_room_is_in_step_with_who_had(interpreted_pool):
    interpreted_pool.run(go_back_to_the_old_heap, num_ranks=NUM_RANKS)


def test_low_latency_rounds_begin_again(interpreted_pool):
    found = interpreted_pool.run(go_at_low_latency, num_ranks=NUM_RANKS)
    assert found == [{0, 1, 2, 3}] * NUM_RANKS, "both zones, there and back"


def test_high_throughput_rounds_begin_again(interpreted_pool):
    found = interpreted_pool.run(go_at_high_throughput, num_ranks=NUM_RANKS)
    assert found == [{4, 5, 6, 7}] * NUM_RANKS, "route, send, place and combine"


def ask_for_each(_: Any, name: str) -> list[tuple[int, list[int], list[int]]]:
    from tests.worlds import round_kernels

    ask, asked = getattr(round_kernels, name), MAY_WRITE if name == "may_write" else ALL_COME
    return [tuple(ask(*question)) for *question, _ in asked]


LAST, FIRST = 2**31 - 1, -(2**31)
MAY_WRITE = [
    (7, [6, 6, 9], None, (1, [], [])),
    (7, [6, 5, 6], None, (0, [1], [])),
    (FIRST, [LAST, LAST, FIRST], None, (1, [], [])),
    (FIRST, [LAST, LAST - 1, LAST], None, (0, [1], [])),
    (FIRST + 9, [FIRST + 8, FIRST + 8, LAST], None, (0, [2], [])),
    (-5, [-6, -6, -7], None, (0, [2], [])),
    (7, [6, 5, 6], [], (1, [], [1])),
    (7, [6, 2, 6], [1], (1, [], [1])),
    (7, [6, 6, 6], [0], (0, [], [0])),
    (7, [6, 2, 2], [0], (0, [], [0])),
]
"""Number of a round, rounds that ranks have behind them, and who is masked, if a rank may be;
whether rank 0 may write, who is reported, and who is masked then: without itself it may nothing."""

ALL_COME = [
    (7, [7, 7, 7], None, (6, [], [])),
    (7, [7, 6, 7], None, (-1, [1], [])),
    (7, [7, 8, 7], None, (-1, [1], [])),
    (FIRST, [FIRST, FIRST, LAST], None, (-1, [2], [])),
    (7, [7, 6, 7], [], (4, [], [1])),
    (7, [7, 6, 7], [1], (4, [], [1])),
    (7, [7, 7, 7], [1], (4, [], [1])),
    (7, [7, 6, 6], [0], (0, [], [0])),
]
"""The same of words that ranks write: 1, 2 and 3, of which the sum is told, if all have come that
are counted on; or -1."""


@pytest.mark.parametrize(("name", "asked"), [("may_write", MAY_WRITE), ("all_come", ALL_COME)])
def test_waits_end_as_they_should(interpreted_pool, name, asked):
    (found,) = interpreted_pool.run(ask_for_each, name, num_ranks=1)
    assert found == [told for *_, told in asked]
