"""The collective transport when ranks, or the host of the store, go: who is named, and when."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from crossdock import Buffer, TransportError, worlds
from crossdock.transports.header import Call, Header, Operation

FIRST_S = 30.0


def open_buffer(timeout_s: float, group: dist.ProcessGroup | None = None) -> Buffer:
    """A buffer that has been used, so that the next wait has the steady deadline."""
    buffer = Buffer(
        group, transport="collective", timeout_s=timeout_s, first_call_timeout_s=FIRST_S
    )
    for _ in range(2):
        dispatch(buffer)
    return buffer


def dispatch(buffer: Buffer) -> None:
    topk_idx = torch.arange(buffer.group_size).repeat(3, 1)
    _, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, buffer.group_size)
    buffer.dispatch(
        torch.ones(3, 8),
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=topk_idx,
    )


def outcome_of(act: Callable[[], None]) -> dict[str, Any]:
    """What a call raised, and after how long; any error at all, so that raw ones are seen."""
    began, error = time.monotonic(), None
    try:
        act()
    except Exception as raised:
        error = raised
    return {
        "kind": type(error).__name__,
        "ours": isinstance(error, TransportError),
        "missing": getattr(error, "missing", None),
        "text": str(error),
        "began": began,
        "waited_s": time.monotonic() - began,
    }


def survivors(job: Callable[..., Any], num_ranks: int, *args: Any) -> dict[int, dict[str, Any]]:
    """What the ranks returned that lived to return anything."""
    try:
        results = worlds.spawn(job, num_ranks, *args, timeout_s=60)
    except worlds.WorldError as error:
        return {rank: told for rank, told in error.results.items() if told}
    return {rank: told for rank, told in enumerate(results) if told}


def die_and_dawdle(
    rank: int, num_ranks: int, deadline_s: float, dead: list[int], late: dict[int, float]
) -> dict[str, Any]:
    """Some die between calls, some come later than the others."""
    buffer = open_buffer(deadline_s)
    dist.barrier()
    if rank in dead:
        os._exit(1)
    time.sleep(late.get(rank, 0.0))
    told = outcome_of(partial(dispatch, buffer))
    time.sleep(0.5)  # its connections close when it ends, which is not the subject
    return told


@pytest.mark.parametrize(
    ("num_ranks", "deadline_s", "dead", "late"),
    [(3, 8.0, [2], {1: 3.0}), (4, 3.0, [1], {0: 1.5, 3: 1.0}), (4, 2.0, [1, 2], {3: 1.0})],
)
def test_who_is_only_late_is_not_named(
    num_ranks: int, deadline_s: float, dead: list[int], late: dict[int, float]
) -> None:
    results = survivors(die_and_dawdle, num_ranks, deadline_s, dead, late)
    assert set(results) == set(range(num_ranks)) - set(dead)
    for told in results.values():
        assert told["kind"] == "PeerTimeoutError", told
        assert told["missing"] == dead, told
        assert told["waited_s"] < deadline_s + 1


def test_the_dead_and_the_sleeping_are_both_named() -> None:
    results = survivors(die_and_dawdle, 4, 2.0, [1], {3: 5.0})
    for rank in (0, 2):
        assert results[rank]["missing"] == [1, 3], results[rank]
        assert results[rank]["waited_s"] < 3
    assert "gave up while this rank was in dispatch 3" in results[3]["text"]
    assert results[3]["waited_s"] < 1


def die_between_phases(rank: int, num_ranks: int) -> dict[str, Any]:
    """The last rank has told its header and dies before it has sent its rows."""
    buffer = open_buffer(3.0)
    if rank == num_ranks - 1:
        buffer._session.transport.send = lambda *args: os._exit(1)
    told = outcome_of(partial(dispatch, buffer))
    time.sleep(0.5)
    return told


def test_who_waits_for_the_dead_is_not_named() -> None:
    results = survivors(die_between_phases, 5)
    assert set(results) == {0, 1, 2, 3}
    for told in results.values():
        assert told["missing"] == [4], told
        assert told["waited_s"] < 4


def finish_first(rank: int, num_ranks: int, beyond: bool) -> dict[str, Any] | None:
    """Rank 2 dies in the middle of a call; rank 1 was through with it, and computes."""
    buffer = open_buffer(2.0)
    transport = buffer._session.transport
    if rank == 2:
        transport.send = lambda *args: os._exit(1)
    if rank == 1:
        wait_for = transport._await
        transport._await = lambda work, wait: wait.phase == "land" or wait_for(work, wait)
    told = outcome_of(partial(dispatch, buffer))
    if rank == 1:
        if beyond:
            transport._notes.enter(Call(Operation.DISPATCH, 4, 2.0), Header(1, 4))
        time.sleep(4.0)
        return None
    return told


@pytest.mark.parametrize("beyond", [False, True])
def test_who_is_through_with_the_call_is_not_named(beyond: bool) -> None:
    results = survivors(finish_first, 3, beyond)
    assert set(results) == {0}
    assert results[0]["missing"] == [2], results[0]
    assert results[0]["waited_s"] < 3


def be_interrupted(rank: int, num_ranks: int) -> dict[str, Any]:
    """Rank 2 is interrupted while it waits; the deadline is far away."""
    buffer = open_buffer(30.0)
    if rank == 2:
        signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
    if rank == 0:
        time.sleep(1.5)
    try:
        return outcome_of(partial(dispatch, buffer))
    except KeyboardInterrupt:
        return {"kind": "KeyboardInterrupt"}
    finally:
        time.sleep(2.5)  # stays until the others have spoken: a closed connection is also heard


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_rank_is_heard_in_the_middle_of_a_wait() -> None:
    results = worlds.spawn(be_interrupted, 4, timeout_s=60)
    assert results[2] == {"kind": "KeyboardInterrupt"}
    for rank in (0, 1, 3):
        assert results[rank]["kind"] == "TransportError", results[rank]
        assert "rank 2 gave up while this rank was in dispatch 3" in results[rank]["text"]
        assert "KeyboardInterrupt" in results[rank]["text"]
        assert results[rank]["waited_s"] < 2


def differ_in_patience(rank: int, num_ranks: int) -> dict[str, Any]:
    """Rank 2 sleeps; rank 0 gives up first."""
    buffer = open_buffer(30.0 if rank == 1 else 1.5)
    if rank == 2:
        time.sleep(4.0)
    told = outcome_of(partial(dispatch, buffer))
    time.sleep(4.0)
    return told


def test_a_timeout_is_passed_on() -> None:
    results = worlds.spawn(differ_in_patience, 3, timeout_s=60)
    for rank in (0, 1):
        assert results[rank]["missing"] == [2], results[rank]
        assert results[rank]["waited_s"] < 2.5
    assert "Reported by rank 0." in results[1]["text"]
    assert results[2]["kind"] == "TransportError"
    assert "rank 0 gave up while this rank was in dispatch 3: PeerTimeout" in results[2]["text"]


def lose_the_store(rank: int, num_ranks: int, port: int, wait_s: float) -> dict[str, Any]:
    """Rank 0 hosts the store, and is killed."""
    dist.destroy_process_group()
    store = dist.TCPStore("127.0.0.1", port, num_ranks, rank == 0, timedelta(seconds=20))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    buffer = open_buffer(5.0)
    dist.barrier()
    if rank == 0:
        time.sleep(0.5 - wait_s)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(wait_s)
    told = outcome_of(partial(dispatch, buffer))
    again = outcome_of(partial(dispatch, buffer))
    time.sleep(0.5)
    return told | {"again": again["ours"]}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("wait_s", [0.0, 0.5])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_the_host_of_the_store_dies(num_ranks: int, wait_s: float) -> None:
    results = survivors(lose_the_store, num_ranks, free_port(), wait_s)
    assert set(results) == set(range(1, num_ranks))
    for told in results.values():
        assert told["ours"], told
        assert told["again"], told
        assert told["waited_s"] < 6
        if told["kind"] == "PeerTimeoutError":
            assert told["missing"] == [0]
        else:
            assert told["kind"] == "StoreLostError"
            assert "host of the store is among the suspects" in told["text"]
