"""Ranks that stop calling the kernels, interpreted: who is named, and how soon."""

from __future__ import annotations

import time

import pytest
import torch

from crossdock import Buffer, PeerTimeoutError, ShapeError, TransportError

DEADLINE_S = 0.5
NUM_RANKS = 3


def dispatch_once(buffer: Buffer, dtype: torch.dtype = torch.bfloat16) -> None:
    topk_idx = torch.arange(NUM_RANKS).repeat(2, 1)
    x = torch.ones((2, 16), dtype=dtype)
    buffer.low_latency_dispatch(x, topk_idx, 2, NUM_RANKS, use_fp8=False)


def combine_once(buffer: Buffer) -> None:
    topk_idx = torch.arange(NUM_RANKS).repeat(2, 1)
    _, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, NUM_RANKS)
    given = {"is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert}
    rows, *_, handle, _ = buffer.dispatch(torch.ones(2, 16), **given, topk_idx=topk_idx)
    buffer.combine(rows, handle)


CALLS = {"low latency dispatch": dispatch_once, "dispatch": combine_once}


def stop_calling(group, name, num_rounds, leaving):
    """Rounds of all ranks, then those of the ranks that stay: what they learn, and how soon."""
    call = CALLS[name]
    buffer = Buffer(group, transport="device", timeout_s=DEADLINE_S, first_call_timeout_s=20)
    for _ in range(num_rounds):
        call(buffer)
    if buffer.rank in leaving:
        return None
    began = time.monotonic()
    attempts = (lambda: call(buffer), buffer.check, lambda: call(buffer))
    failed = [missing for attempt in attempts for missing in missed_in(attempt)]
    return failed, time.monotonic() - began


def missed_in(attempt):
    try:
        attempt()
    except PeerTimeoutError as error:
        return [(tuple(error.missing), error.operation)]
    return []


@pytest.mark.parametrize(
    ("name", "leaving"), [("low latency dispatch", [0, 2]), ("dispatch", [1]), ("dispatch", [0, 2])]
)
def test_every_rank_that_is_missing_is_named_and_no_other(interpreted_pool, name, leaving):
    results = interpreted_pool.run(stop_calling, name, 3, leaving, num_ranks=NUM_RANKS)
    for rank, told in enumerate(results):
        if rank in leaving:
            continue
        failed, waited_s = told
        assert len(failed) >= 2, "a check, and every later call, say it again"
        assert set(failed) == {(tuple(leaving), name)}
        assert waited_s < 60 * DEADLINE_S, "polls are counted, and other ranks poll as well"


def refuse(group, culprit):
    """One rank's arguments are wrong; it says so, and the others need not wait for it."""
    buffer = Buffer(group, transport="device", timeout_s=60, first_call_timeout_s=60)
    dispatch_once(buffer)
    try:
        dispatch_once(buffer, torch.float32 if buffer.rank == culprit else torch.bfloat16)
        buffer.check()
    except ShapeError:
        return "ShapeError"
    except TransportError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_rank_that_refuses_is_named_at_once(interpreted_pool):
    told = interpreted_pool.run(refuse, 1, num_ranks=NUM_RANKS)
    assert told[1] == "ShapeError"
    for rank in (0, 2):
        assert told[rank].startswith(("TransportError", "PeerRefusedError"))
        assert "rank 1" in told[rank]
        assert "ShapeError" in told[rank], "why, in the words of who refused"
