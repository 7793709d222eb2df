"""The words between ranks, each on its own."""

from __future__ import annotations

from crossdock.transports.control import BLOCK_BYTES, Control
from crossdock.transports.header import Call, Header, Operation
from crossdock.transports.heap_shm import Segment, ShmHeap


def test_the_reasons_of_two_calls_in_a_row_do_not_meet() -> None:
    """A rank may refuse the next call before a peer has read why it refused this one."""
    segment = Segment(BLOCK_BYTES)
    control = Control(ShmHeap(segment, [segment.address]), rank=0, num_ranks=1)
    calls = [Call(Operation.DISPATCH, number, 1.0) for number in (1, 2)]
    for call in calls:
        control.post_header(call, Header(sequence=call.sequence), reason=f"because of {call}")
    control.fail(calls[1], ValueError("and this is yet another text"))
    assert [control.reason_of(call, 0) for call in calls] == [
        "because of dispatch 1",
        "because of dispatch 2",
    ]
    assert [control.headers(call)[0].sequence for call in calls] == [1, 2]
