"""GPUs whose peers stop calling: who is named, how soon, and what the GPU can do afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from crossdock import Buffer, PeerTimeoutError
from tests.gpu.adapter import NEEDS_GPUS, spin

pytestmark = NEEDS_GPUS

DEADLINE_S, GRACE_S = 2.0, 1.0
NUM_RANKS, TOKENS, HIDDEN = 4, 64, 512
LEAVING = (1, 3)


class Calls:
    """Calls of every kind, with what they need in place."""

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        self.idx = torch.arange(NUM_RANKS, device="cuda").repeat(TOKENS, 1)
        self.weights = torch.ones((TOKENS, NUM_RANKS), device="cuda")
        self.x = torch.ones((TOKENS, HIDDEN), dtype=torch.bfloat16, device="cuda")
        layout = buffer.get_dispatch_layout(self.idx, NUM_RANKS)
        self.layout = {"is_token_in_rank": layout[3], "num_tokens_per_expert": layout[2]}
        self.layout["topk_idx"] = self.idx

    def low_latency(self) -> None:
        """There and back."""
        rows, _, handle, *_ = self.buffer.low_latency_dispatch(
            self.x, self.idx, TOKENS, NUM_RANKS, use_fp8=False
        )
        self.buffer.low_latency_combine(rows, self.idx, self.weights, handle)

    def exact(self) -> None:
        """The host waits for sizes, and sees in this call already that ranks are missing."""
        rows, *_, handle, _ = self.buffer.dispatch(self.x, **self.layout)
        self.buffer.combine(rows, handle)

    def padded(self) -> None:
        """The host waits for nothing."""
        worst = {"num_worst_tokens": NUM_RANKS * TOKENS}
        rows, *_, handle, _ = self.buffer.dispatch(self.x, **self.layout, **worst)
        self.buffer.combine(rows, handle)


class Told(NamedTuple):
    """What a rank that stayed has learnt.

    Attributes:
        missing: the ranks each error names: of the call or a check after it, and of a later call.
        waited_s: until the first of them.
        product: what a matrix product gave afterwards.
    """

    missing: list[list[int]]
    waited_s: float
    product: float


def stop_calling(group: Any, name: str, num_rounds: int) -> Told | None:
    buffer = Buffer(group, transport="device", timeout_s=DEADLINE_S, first_call_timeout_s=300)
    calls = Calls(buffer)
    call = getattr(calls, name)
    for _ in range(num_rounds):
        call()
    torch.cuda.synchronize()
    if buffer.rank in LEAVING:
        time.sleep(3 * DEADLINE_S)
        return None
    began = time.monotonic()
    missing = missed_in(lambda: finish(call, buffer))
    waited_s = time.monotonic() - began
    missing += missed_in(call)
    ones = torch.ones((256, 256), device="cuda")
    return Told(missing, waited_s, float((ones @ ones).sum()))


def finish(call: Callable[[], None], buffer: Buffer) -> None:
    """A call, and what it left on the GPU."""
    call()
    torch.cuda.synchronize()
    buffer.check()


def missed_in(attempt: Callable[[], None]) -> list[list[int]]:
    try:
        attempt()
    except PeerTimeoutError as error:
        return [error.missing]
    return []


@pytest.mark.parametrize("name", ["low_latency", "exact", "padded"])
def test_two_ranks_that_stop_calling_are_named_by_the_others(pool: Any, name: str) -> None:
    results = pool.run(stop_calling, name, 5)
    for rank, told in enumerate(results):
        if rank in LEAVING:
            assert told is None
            continue
        assert told.missing == [list(LEAVING)] * 2
        assert DEADLINE_S / 2 < told.waited_s < DEADLINE_S + GRACE_S
        assert told.product == 256.0**3


def be_late(group: Any, name: str) -> str:
    """A rank that is late, but not too late, is waited for."""
    buffer = Buffer(group, transport="device", timeout_s=DEADLINE_S, first_call_timeout_s=300)
    calls = Calls(buffer)
    call = getattr(calls, name)
    for turn in range(8):
        if turn % NUM_RANKS == buffer.rank:
            time.sleep(DEADLINE_S / 4)
            spin(DEADLINE_S / 8 * 1e6)
        call()
    torch.cuda.synchronize()
    buffer.check()
    return buffer.transport


@pytest.mark.parametrize("name", ["low_latency", "exact", "padded"])
def test_ranks_that_are_late_are_waited_for(pool: Any, name: str) -> None:
    assert pool.run(be_late, name) == ["device"] * NUM_RANKS


def wait_in_vain(group: Any) -> bool:
    """Half way to the deadline a wait for ranks that left is still going on."""
    buffer = Buffer(group, transport="device", timeout_s=DEADLINE_S, first_call_timeout_s=300)
    calls = Calls(buffer)
    calls.low_latency()
    torch.cuda.synchronize()
    if buffer.rank in LEAVING:
        time.sleep(DEADLINE_S)
        return True
    calls.low_latency()
    done = torch.cuda.Event()
    done.record()
    time.sleep(DEADLINE_S / 2)
    early = done.query()
    torch.cuda.synchronize()
    return not early


def test_a_wait_does_not_end_before_its_deadline(pool: Any) -> None:
    assert pool.run(wait_in_vain) == [True] * NUM_RANKS
