"""Ranks that are masked: by their caller, or because they missed a deadline; and their return."""

from __future__ import annotations

import os
import signal
import time
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from crossdock import (
    Buffer,
    ConfigError,
    PeerTimeoutError,
    ShapeError,
    TransportError,
    UnsupportedError,
    worlds,
)
from crossdock import reference_low_latency as oracle
from crossdock.cases import choose, origin_rows

NUM_RANKS, SLOTS, HIDDEN, TOPK, LOCAL = 4, 12, 64, 3, 2
EXPERTS = NUM_RANKS * LOCAL
VICTIM = 2


class Round(NamedTuple):
    """What every rank brings to one round."""

    xs: list[torch.Tensor]
    topk_idxs: list[torch.Tensor]
    topk_weights: list[torch.Tensor]


def make_round(number: int) -> Round:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(number)
    lengths = [(5 * rank + 3 * number) % (SLOTS + 1) for rank in range(NUM_RANKS)]
    xs = [
        origin_rows(rank, length, HIDDEN, dtype=torch.bfloat16)
        for rank, length in enumerate(lengths)
    ]
    idxs = [choose(length, EXPERTS, TOPK, generator=generator) for length in lengths]
    weights = [torch.rand(length, TOPK, generator=generator) for length in lengths]
    return Round(xs, idxs, weights)


def open_buffer(group: Any, **options: Any) -> Buffer:
    usual = {"enable_shrink": True, "timeout_s": 2.0, "first_call_timeout_s": 10.0}
    return Buffer(group, low_latency_mode=True, **{**usual, **options})


def go(buffer: Buffer, number: int, *, live: set[int], hook: bool = False) -> str:
    """One round of dispatch, doubling experts and combine; what is wrong with it."""
    given, rank = make_round(number), buffer.rank
    x, idx, weights = given.xs[rank], given.topk_idxs[rank], given.topk_weights[rank]
    rows, count, handle, _, receive = buffer.low_latency_dispatch(
        x, idx, SLOTS, EXPERTS, use_fp8=False, return_recv_hook=hook
    )
    if receive:
        receive()
    right = oracle.dispatch(
        given.xs, given.topk_idxs, num_experts=EXPERTS, format="bf16", live=live
    )
    mine = right[rank]
    faults = [] if count.tolist() == mine.recv_count else [f"{count.tolist()}: {mine.recv_count}"]
    for expert, wanted in enumerate(mine.rows):
        if not torch.equal(rows[expert, : len(wanted)], wanted):
            faults.append(f"rows of expert {expert}")
    answers = torch.full_like(rows, torch.nan)
    for expert, number_here in enumerate(mine.recv_count):
        answers[expert, :number_here] = rows[expert, :number_here] * 2
    combined, _, receive = buffer.low_latency_combine(
        answers, idx, weights, handle, return_recv_hook=hook
    )
    if receive:
        receive()
    doubled = [[rows * 2 for rows in each.rows] for each in right]
    exact = oracle.combine(
        doubled, given.topk_idxs, given.topk_weights, num_experts=EXPERTS, live=live
    )[rank].combined
    if not torch.allclose(combined.double(), exact, rtol=2**-7, atol=1e-3):
        faults.append(f"sums, off by {(combined.double() - exact).abs().max()}")
    return "; ".join(f"round {number}: {fault}" for fault in faults)


def go_through_views(buffer: Buffer, number: int, *, live: set[int], hook: bool = False) -> str:
    """The same with rows that stay where they land, and go back doubled; or are read there."""
    given, rank = make_round(number), buffer.rank
    x, idx, here = given.xs[rank], given.topk_idxs[rank], EXPERTS // NUM_RANKS
    views, _, receive = buffer.low_latency_dispatch_views(
        x, idx, SLOTS, num_experts=EXPERTS, use_fp8=False, return_recv_hook=hook
    )
    if receive:
        receive()
    faults, is_here = [], views.src_idx >= 0
    for src, (rows, chosen) in enumerate(zip(given.xs, given.topk_idxs, strict=True)):
        wanted = (chosen // here == rank).any(1) & (src in live) & (rank in live)
        found = is_here[src, : len(wanted)]
        if not torch.equal(found, wanted) or is_here[src].sum() != wanted.sum():
            faults.append(f"rows of rank {src}")
        elif not torch.equal(views.tokens[src, : len(wanted)][wanted], rows[wanted]):
            faults.append(f"what is in rows of rank {src}")
    answers = torch.full_like(views.tokens, torch.nan)
    answers[is_here] = 2 * views.tokens[is_here]
    if not hook:
        answers = buffer.get_next_low_latency_views_buffer(views, HIDDEN).copy_(answers)
    combined, _, receive = buffer.low_latency_combine_views(
        answers, idx, views, zero_copy=not hook, return_recv_hook=hook
    )
    if receive:
        receive()
    times = torch.stack([(idx // here == dst).any(1) for dst in sorted(live)]).sum(0)
    times *= int(rank in live)
    if not torch.equal(combined, (2 * x.float() * times[:, None]).bfloat16()):
        faults.append("sums")
    return "; ".join(f"round {number}: {fault}" for fault in faults)


def masked(buffer: Buffer) -> list[int]:
    status = torch.full((buffer.group_size,), 7, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    return status.tolist()


def mask_and_unmask(group: Any, *, views: bool = False) -> list[str]:
    """All ranks mask one, go on, and bring it back; it makes the same calls meanwhile."""
    faults, everyone = [], set(range(NUM_RANKS))
    call = go_through_views if views else go
    with open_buffer(group) as buffer:
        faults.append(call(buffer, 0, live=everyone))
        for number in range(1, 4):
            buffer.low_latency_update_mask_buffer(VICTIM, True)
            faults.append(call(buffer, 3 * number, live=everyone - {VICTIM}, hook=True))
            faults.append(call(buffer, 3 * number + 1, live=everyone - {VICTIM}))
            if masked(buffer) != [int(rank == VICTIM) for rank in range(NUM_RANKS)]:
                faults.append(f"masks {masked(buffer)}")
            dist.barrier(group)
            buffer.low_latency_clean_mask_buffer()
            faults.append(call(buffer, 3 * number + 2, live=everyone))
        if any(masked(buffer)):
            faults.append(f"masks {masked(buffer)} in the end")
    return [fault for fault in faults if fault]


def mask_and_unmask_views(group: Any) -> list[str]:
    return mask_and_unmask(group, views=True)


@pytest.mark.parametrize("job", [mask_and_unmask, mask_and_unmask_views])
def test_a_masked_rank_contributes_nothing_and_comes_back(pool: worlds.Pool, job: Any) -> None:
    assert pool.run(job, num_ranks=NUM_RANKS) == [[]] * NUM_RANKS


def mask_on_one_rank(group: Any) -> tuple[list[str], list[int]]:
    """Only rank 0 masks; the others hear of it in the next call."""
    with open_buffer(group) as buffer:
        faults = [go(buffer, 0, live=set(range(NUM_RANKS)))]
        if buffer.rank == 0:
            buffer.low_latency_update_mask_buffer(VICTIM, True)
        live = set(range(NUM_RANKS)) - {VICTIM}
        faults += [go(buffer, number, live=live) for number in (1, 2)]
        return [fault for fault in faults if fault], masked(buffer)


def test_a_mask_of_one_rank_is_taken_over_by_all(pool: worlds.Pool) -> None:
    results = pool.run(mask_on_one_rank, num_ranks=NUM_RANKS)
    assert results == [([], [0, 0, 1, 0])] * NUM_RANKS


def mask_again_and_again(group: Any) -> list[str]:
    """One rank masks another, the next call makes it one of all, without a wait for a deadline."""
    faults, everyone = [], set(range(3))
    with open_buffer(group, timeout_s=5.0) as buffer:
        buffer.warmup(SLOTS, HIDDEN)
        dispatch_ones(buffer)  # while ranks are masked there is no more room to be had
        for number in range(30):
            if buffer.rank == 0:
                buffer.low_latency_update_mask_buffer(VICTIM, True)
            begin = time.monotonic()
            dispatch_ones(buffer)
            if time.monotonic() - begin > 2:
                faults.append(f"round {number} waited for a masked rank")
            if masked(buffer) != [0, 0, 1]:
                faults.append(f"round {number}: masks {masked(buffer)}, not of {everyone}")
            dist.barrier(group)
            buffer.low_latency_clean_mask_buffer()
            if dispatch_ones(buffer) != 3:
                faults.append(f"round {number}: not all are back")
            dist.barrier(group)
    return faults


def dispatch_ones(buffer: Buffer) -> int:
    """Every rank sends one token to the expert of every rank; how many have come here."""
    ranks = torch.arange(buffer.group_size)[None]
    x = torch.ones((1, 8), dtype=torch.bfloat16)
    _, count, *_ = buffer.low_latency_dispatch(x, ranks, 1, buffer.group_size, use_fp8=False)
    return int(count)


def test_a_mask_in_a_header_is_never_passed_over(pool: worlds.Pool) -> None:
    assert pool.run(mask_again_and_again, num_ranks=3) == [[], [], []]


def leave_between_dispatch_and_combine(group: Any, bring_weights: bool) -> list[float]:
    """A rank is away in a dispatch, or only after it; sums hold what has come from those there."""
    topk_idx, x = torch.arange(3)[None], torch.ones((1, 8), dtype=torch.bfloat16)
    weights = torch.ones((1, 3))
    early = weights if bring_weights else None
    found = []
    with open_buffer(group) as buffer:
        # While ranks are masked there is no more room to be had.
        rows, _, handle, *_ = buffer.low_latency_dispatch(
            x, topk_idx, 2, 3, use_fp8=False, topk_weights=early
        )
        buffer.low_latency_combine(rows, topk_idx, weights, handle)
        for moment in ("in dispatch", "after dispatch"):
            if moment == "in dispatch":
                buffer.low_latency_update_mask_buffer(VICTIM, True)
            rows, _, handle, *_ = buffer.low_latency_dispatch(
                x, topk_idx, 2, 3, use_fp8=False, topk_weights=early
            )
            if moment == "after dispatch":
                buffer.low_latency_update_mask_buffer(VICTIM, True)
                dispatch_ones(buffer)
            dist.barrier(group)
            buffer.low_latency_clean_mask_buffer()
            for _ in range(2):
                sums, *_ = buffer.low_latency_combine(rows, topk_idx, weights, handle)
                found.append(float(sums[0, 0]))
            dist.barrier(group)
    return found


@pytest.mark.parametrize("bring_weights", [False, True])
def test_a_rank_that_returns_before_the_combine_owes_nothing(
    pool: worlds.Pool, bring_weights: bool
) -> None:
    results = pool.run(leave_between_dispatch_and_combine, bring_weights, num_ranks=3)
    # Asked for weights in combine, ranks send what they have, and that is all of the second.
    after = [2.0, 2.0] if bring_weights else [3.0, 3.0]
    alone = [0.0, 0.0] if bring_weights else [3.0, 3.0]
    assert results[0] == results[1] == [2.0, 2.0, *after]
    assert results[VICTIM] == [0.0, 0.0, *alone]


def come_early(group: Any) -> tuple[int, list[int]]:
    """All but one are late for longer than the deadline: the one waits."""
    with open_buffer(group, timeout_s=3.0) as buffer:
        buffer.warmup(SLOTS, HIDDEN)
        dispatch_ones(buffer)
        dist.barrier(group)
        if buffer.rank != VICTIM:
            time.sleep(3.5)
        return dispatch_ones(buffer), masked(buffer)


def test_one_rank_does_not_go_on_without_all_others(pool: worlds.Pool) -> None:
    assert pool.run(come_early, num_ranks=NUM_RANKS) == [(4, [0, 0, 0, 0])] * NUM_RANKS


def come_back_one_by_one(group: Any) -> list[tuple[int, list[int]]]:
    """Rank 3 returns while rank 2 is away, and must not bring its old masks along."""
    seen = []
    with open_buffer(group) as buffer:
        buffer.warmup(SLOTS, HIDDEN)
        dispatch_ones(buffer)  # while ranks are masked there is no more room to be had
        for change, rank in ((True, 3), (True, 2), (False, 3), (False, 2)):
            buffer.low_latency_update_mask_buffer(rank, change)
            seen.append((dispatch_ones(buffer), masked(buffer)))
            dist.barrier(group)
    return seen


def test_who_returns_takes_over_the_masks_of_the_others(pool: worlds.Pool) -> None:
    results = pool.run(come_back_one_by_one, num_ranks=NUM_RANKS)
    for rank in (0, 1):
        counts = [3, 2, 3, 4]
        masks = [[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]]
        assert results[rank] == list(zip(counts, masks, strict=True))
    assert results[3][2:] == [(3, [0, 0, 1, 0]), (4, [0, 0, 0, 0])]
    assert results[2][3] == (4, [0, 0, 0, 0])


def die_while_growing(rank: int, num_ranks: int) -> tuple[str, Any]:
    """The victim has told its header of a call for which the buffer must grow."""
    buffer = open_buffer(dist.group.WORLD, timeout_s=1.0, first_call_timeout_s=1.0)
    dist.barrier()
    if rank == VICTIM:
        buffer._session.transport._replace_heap = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    try:
        dispatch_ones(buffer)
    except TransportError as error:
        time.sleep(1.0)
        return type(error).__name__, getattr(error, "missing", None)
    return "", None


def test_who_is_lost_while_the_buffer_grows_is_named() -> None:
    with pytest.raises(worlds.WorldError) as caught:
        worlds.spawn(die_while_growing, NUM_RANKS, timeout_s=60)
    told = {rank: each for rank, each in caught.value.results.items() if rank != VICTIM}
    assert told == dict.fromkeys((0, 1, 3), ("PeerTimeoutError", [VICTIM]))


def fall_asleep(group: Any, num_alone: int) -> tuple[list[str], list[int], float]:
    """A rank oversleeps a deadline; the others go on, and it comes back when all unmask it.

    Meanwhile it makes as many rounds alone: fewer than the others, or more, or none, so that it
    does not know that it was masked.
    """
    everyone, faults = set(range(NUM_RANKS)), []
    with open_buffer(group, timeout_s=1.0, first_call_timeout_s=5.0) as buffer:
        buffer.warmup(SLOTS, HIDDEN)
        faults.append(go(buffer, 0, live=everyone))
        begin = time.monotonic()
        if buffer.rank == VICTIM:
            time.sleep(2.5)
            faults += [go(buffer, number, live=everyone - {VICTIM}) for number in range(num_alone)]
        else:
            faults += [go(buffer, number, live=everyone - {VICTIM}) for number in range(1, 6)]
        waited_s = time.monotonic() - begin
        status = masked(buffer)
        dist.barrier(group)
        buffer.low_latency_clean_mask_buffer()
        faults += [go(buffer, number, live=everyone) for number in range(6, 9)]
        return [fault for fault in faults if fault], status, waited_s


@pytest.mark.parametrize("num_alone", [0, 2, 9])
def test_who_misses_the_deadline_is_masked_and_can_return(
    pool: worlds.Pool, num_alone: int
) -> None:
    results = pool.run(fall_asleep, num_alone, num_ranks=NUM_RANKS)
    assert [faults for faults, *_ in results] == [[]] * NUM_RANKS
    for rank, (_, status, waited_s) in enumerate(results):
        if rank != VICTIM:
            assert status == [0, 0, 1, 0], rank
            assert 0.9 < waited_s < 2.4, rank
    assert results[VICTIM][1] == [0, 0, int(num_alone > 0), 0]


def die_in_the_middle(rank: int, num_ranks: int, shrink: bool, phase: str) -> dict[str, Any]:
    """The victim is killed in some phase of its 20th dispatch; the others make 100 more rounds."""
    buffer = open_buffer(dist.group.WORLD, enable_shrink=shrink)
    buffer.warmup(SLOTS, HIDDEN)
    everyone = set(range(num_ranks))
    faults = [go(buffer, number, live=everyone) for number in range(20)]
    if rank == VICTIM:
        die_at(buffer, phase)
    told: dict[str, Any] = {}
    try:
        # The round in which it dies may still hold its rows, or not: only the others' are judged.
        go(buffer, 20, live=everyone)
        left = everyone - {VICTIM}
        faults += [go(buffer, number, live=left, hook=number % 2 == 0) for number in range(21, 121)]
    except TransportError as error:
        told = {"kind": type(error).__name__, "missing": getattr(error, "missing", None)}
    status = masked(buffer) if shrink else None
    # The connections of who ends first close, which is not the subject.
    time.sleep(0.5)
    return {**told, "faults": [fault for fault in faults if fault], "masks": status}


def die_at(buffer: Buffer, phase: str) -> None:
    """Have this process killed in a phase of its next call."""
    transport = buffer._session.transport

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if phase == "before":
        die()
    if phase == "routed":
        transport.send = die
    if phase == "half sent":
        signals = transport._control.signal
        told = iter(range(NUM_RANKS))

        def signal_once(*args: Any, **rest: Any) -> None:
            if rest.get("peer") is not None and next(told):
                die()
            signals(*args, **rest)

        transport._control.signal = signal_once


def die_while_combining(rank: int, num_ranks: int) -> tuple[bool, str]:
    """The victim is killed when its sums have reached one of the others.

    Returns:
        Whether this rank's result is with what the victim sent, and what is wrong with it.
    """
    buffer, given = open_buffer(dist.group.WORLD), make_round(1)
    buffer.warmup(SLOTS, HIDDEN)
    x, idx, weights = (each[rank] for each in given)
    rows, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, SLOTS, EXPERTS, use_fp8=False)
    if rank == VICTIM:
        die_at(buffer, "half sent")
    combined, _, receive = buffer.low_latency_combine(
        rows, idx, weights, handle, return_recv_hook=True
    )
    receive()
    answers = oracle.dispatch(given.xs, given.topk_idxs, num_experts=EXPERTS, format="bf16")
    of_victim = [torch.zeros_like(each) for each in answers[VICTIM].rows]
    all_rows = [each.rows for each in answers]
    without = [*all_rows[:VICTIM], of_victim, *all_rows[VICTIM + 1 :]]
    near = [
        torch.allclose(
            combined.double(),
            oracle.combine(made, given.topk_idxs, given.topk_weights, num_experts=EXPERTS)[
                rank
            ].combined,
            rtol=2**-7,
            atol=1e-3,
        )
        for made in (all_rows, without)
    ]
    time.sleep(0.5)
    return near[0], "" if any(near) else "neither with the victim's sums nor without them"


def test_who_is_lost_in_a_combine_contributes_what_has_arrived_or_nothing() -> None:
    with pytest.raises(worlds.WorldError) as caught:
        worlds.spawn(die_while_combining, NUM_RANKS, timeout_s=60)
    told = {rank: each for rank, each in caught.value.results.items() if each}
    assert {rank: fault for rank, (_, fault) in told.items()} == {0: "", 1: "", 3: ""}
    assert not all(is_whole for is_whole, _ in told.values())


def survivors(shrink: bool, phase: str) -> dict[int, dict[str, Any]]:
    with pytest.raises(worlds.WorldError) as caught:
        worlds.spawn(die_in_the_middle, NUM_RANKS, shrink, phase, timeout_s=60)
    return {rank: told for rank, told in caught.value.results.items() if told}


@pytest.mark.parametrize("phase", ["before", "routed", "half sent"])
def test_the_others_go_on_when_a_rank_is_killed(phase: str) -> None:
    results = survivors(True, phase)
    assert len(results) == NUM_RANKS - 1
    for told in results.values():
        assert told == {"faults": [], "masks": [0, 0, 1, 0]}


def test_without_shrinking_the_killed_rank_is_named() -> None:
    results = survivors(False, "half sent")
    assert len(results) == NUM_RANKS - 1
    for told in results.values():
        assert told["kind"] == "PeerTimeoutError"
        assert told["missing"] == [VICTIM]


def shrink_and_do_what_is_not_possible(group: Any) -> list[str]:
    """High-throughput calls and growth, while a rank is masked; and both afterwards."""
    with open_buffer(group) as buffer:
        go(buffer, 0, live=set(range(NUM_RANKS)))
        buffer.low_latency_update_mask_buffer(VICTIM, True)
        told = []
        topk_idx = torch.zeros((2, 1), dtype=torch.int64)
        layout = buffer.get_dispatch_layout(topk_idx, EXPERTS)
        arguments = {"is_token_in_rank": layout[3], "num_tokens_per_expert": layout[2]}
        x = torch.zeros((2, 8), dtype=torch.bfloat16)
        try:
            buffer.dispatch(x, **arguments, topk_idx=topk_idx)
        except UnsupportedError as error:
            told.append(str(error))
        try:
            wide = torch.zeros((1, 1 << 16), dtype=torch.bfloat16)
            buffer.low_latency_dispatch(wide, topk_idx[:1], SLOTS, EXPERTS, use_fp8=False)
        except TransportError as error:
            told.append(type(error).__name__)
        fault = go(buffer, 1, live=set(range(NUM_RANKS)) - {VICTIM})
        dist.barrier(group)
        buffer.low_latency_update_mask_buffer(VICTIM, False)
        buffer.dispatch(x, **arguments, topk_idx=topk_idx)
        return [*told, fault]


def test_what_needs_all_ranks_says_so_and_works_again_afterwards(pool: worlds.Pool) -> None:
    results = pool.run(shrink_and_do_what_is_not_possible, num_ranks=NUM_RANKS)
    for rank in {0, 1, 3}:
        assert "[2] are masked" in results[rank][0]
        assert results[rank][1:] == ["BufferTooSmallError", ""]
    assert "masked" in results[VICTIM][0]


def ask_without_shrink(group: Any) -> None:
    status = torch.zeros(3, dtype=torch.int32)
    with Buffer(group, transport="one_sided") as buffer:
        with pytest.raises(ConfigError, match="enable_shrink"):
            buffer.low_latency_update_mask_buffer(0, True)
        with pytest.raises(ConfigError, match="enable_shrink"):
            buffer.low_latency_query_mask_buffer(status)
        with pytest.raises(ConfigError, match="enable_shrink"):
            buffer.low_latency_clean_mask_buffer()
    with open_buffer(group) as buffer:
        with pytest.raises(ShapeError, match="rank"):
            buffer.low_latency_update_mask_buffer(2, True)
        with pytest.raises(ShapeError, match="mask_status"):
            buffer.low_latency_query_mask_buffer(status)


def test_masks_have_to_be_asked_for(pool: worlds.Pool) -> None:
    pool.run(ask_without_shrink, num_ranks=2)


def shrink_over_gloo(group: Any) -> str:
    try:
        Buffer(group, enable_shrink=True, transport="collective")
    except UnsupportedError as error:
        return str(error)
    return ""


def test_only_shared_memory_can_shrink(pool: worlds.Pool) -> None:
    for told in pool.run(shrink_over_gloo, num_ranks=2):
        assert "cannot do without a rank" in told


def time_out(group: Any) -> list[int]:
    """A high-throughput call never shrinks: who does not come is named."""
    with open_buffer(group, first_call_timeout_s=1.0) as buffer:
        if buffer.rank == 1:
            time.sleep(2)
            return [1]
        topk_idx = torch.zeros((2, 1), dtype=torch.int64)
        layout = buffer.get_dispatch_layout(topk_idx, 2)
        x = torch.zeros((2, 8), dtype=torch.bfloat16)
        try:
            buffer.dispatch(
                x, is_token_in_rank=layout[3], num_tokens_per_expert=layout[2], topk_idx=topk_idx
            )
        except PeerTimeoutError as error:
            return error.missing
    return []


def test_a_high_throughput_call_does_not_shrink(pool: worlds.Pool) -> None:
    assert pool.run(time_out, num_ranks=2) == [[1], [1]]
