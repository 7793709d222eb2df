"""Low-latency calls between threads: what a combine makes of choices that are not dispatch's."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from crossdock import Buffer, HandleError, PeerTimeoutError, TransportError
from crossdock.low_latency import LowLatency
from crossdock.transports.loopback import run_threads

X = torch.ones((3, 8), dtype=torch.bfloat16)
IDX, WEIGHTS = torch.tensor([[0, 2], [1, 3], [2, 0]]), torch.ones((3, 2))


def dispatch(buffer: Buffer, **rest: Any) -> tuple[Any, ...]:
    return buffer.low_latency_dispatch(X, IDX, 4, 4, use_fp8=False, **rest)


@pytest.mark.parametrize("early", [False, True])
def test_other_numbers_of_tokens_or_choices_are_refused(early: bool) -> None:
    def run(comm: Any) -> float:
        with Buffer(comm=comm, transport="loopback") as buffer:
            rows, _, handle, *_ = dispatch(buffer, topk_weights=WEIGHTS if early else None)
            for part in (slice(2), (slice(None), slice(1))):
                with pytest.raises(HandleError, match=r"dispatch had \[3, 2\]"):
                    buffer.low_latency_combine(rows, IDX[part], WEIGHTS[part], handle)
            sums, *_ = buffer.low_latency_combine(rows, IDX, WEIGHTS, handle)
            return float(sums.sum())

    assert run_threads(2, run) == [48.0, 48.0]


def test_with_early_weights_the_choices_of_dispatch_count() -> None:
    def run(comm: Any) -> list[float]:
        with Buffer(comm=comm, transport="one_sided") as buffer:
            rows, _, handle, *_ = dispatch(buffer, topk_weights=WEIGHTS)
            other = torch.where(IDX < 2, IDX, -1)
            sums, *_ = buffer.low_latency_combine(rows, other, WEIGHTS, handle)
            return sums[:, 0].tolist()

    assert run_threads(2, run) == [[2.0] * 3] * 2


def test_slabs_that_cannot_be_had_are_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(comm: Any) -> int:
        with Buffer(comm=comm, transport="loopback") as buffer:
            for _ in range(3):
                with pytest.raises((MemoryError, TransportError)):
                    dispatch(buffer)
            monkeypatch.undo()
            return int(dispatch(buffer)[1].sum())

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("slabs")

    monkeypatch.setattr(LowLatency, "_empty_slabs", fail)
    assert run_threads(1, run) == [6]


def test_a_buffer_may_be_destroyed_while_a_hook_waits() -> None:
    def run(comm: Any) -> str:
        buffer = Buffer(comm=comm, transport="one_sided", timeout_s=0.5, first_call_timeout_s=0.5)
        if buffer.rank == 1:
            transport = buffer._session.transport
            send = transport.send
            transport.send = lambda *args: time.sleep(1.5) or send(*args)
        try:
            hook = dispatch(buffer, return_recv_hook=True)[4]
            if buffer.rank == 0:
                threading.Timer(0.2, buffer.destroy).start()
            hook()
        except (PeerTimeoutError, TransportError) as error:
            return type(error).__name__
        return ""

    assert run_threads(2, run)[0] == "PeerTimeoutError"
