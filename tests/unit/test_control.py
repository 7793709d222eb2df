"""The words between ranks, each on its own."""

from __future__ import annotations

from collections.abc import Collection
from unittest import mock

import pytest

from crossdock.errors import PeerTimeoutError
from crossdock.transports.control import BLOCK_BYTES, Control, Signal
from crossdock.transports.header import Call, Header, Operation
from crossdock.transports.heap_shm import Segment, ShmHeap
from crossdock.transports.roster import Roster


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


CALL = Call(Operation.LOW_LATENCY_DISPATCH, 1, 0.2)


def three_ranks() -> tuple[list[Control], list[Roster]]:
    """Controls of three ranks in one process, that can shrink."""
    segments = [Segment(3 * BLOCK_BYTES) for _ in range(3)]
    rosters = [Roster(rank, 3, can_shrink=True) for rank in range(3)]
    controls = [
        Control(
            ShmHeap(segment, [each.address for each in segments]),
            rank=rank,
            num_ranks=3,
            roster=rosters[rank],
        )
        for rank, segment in enumerate(segments)
    ]
    return controls, rosters


def test_a_header_that_comes_after_the_others_were_heard_is_heard_too() -> None:
    """Rank 0 masks rank 2, and shows it just when rank 1 has looked at what is there."""
    controls, rosters = three_ranks()
    controls[2].post_header(CALL, Header(sequence=1))
    hear = Control._hear
    late = iter([Header(sequence=1, masked=0b100)])

    def hear_too_early(control: Control, call: Call) -> None:
        hear(control, call)
        for header in late:
            controls[0].post_header(call, header)

    with mock.patch.object(Control, "_hear", hear_too_early):
        controls[1].wait(Signal.POSTED, CALL, phase="route")
    assert rosters[1].masked == {2}


def test_only_the_calls_that_were_made_without_a_rank_leave_it_out() -> None:
    """What rank 0 does without rank 1 from call 2 on says nothing of call 1."""
    controls, rosters = three_ranks()
    rosters[0].mask(1)
    controls[0].exclude({1}, Call(Operation.LOW_LATENCY_DISPATCH, 2, 0.2))
    for peer in (0, 2):
        controls[peer].signal(Signal.LANDED, CALL)
    controls[1].wait(Signal.LANDED, CALL, phase="land")
    assert not rosters[1].is_alone
    controls[1].wait(Signal.POSTED, Call(Operation.LOW_LATENCY_DISPATCH, 2, 0.2), phase="route")
    assert rosters[1].is_alone


def test_who_waits_for_somebody_else_is_not_late() -> None:
    """Rank 2 waits for rank 0 as rank 1 does, and comes as soon as that one is masked."""
    controls, rosters = three_ranks()
    controls[2]._show_waiting(1 << 62)
    drop = Roster.drop

    def drop_and_go_on(roster: Roster, late: Collection[int], call: Call) -> None:
        drop(roster, late, call)
        controls[2].signal(Signal.LANDED, call)

    with mock.patch.object(Roster, "drop", drop_and_go_on):
        controls[1].wait(Signal.LANDED, CALL, phase="land")
    assert rosters[1].masked == {0}


def test_no_rank_is_masked_while_memory_is_made() -> None:
    controls, rosters = three_ranks()
    controls[2].signal(Signal.GROWN, CALL)
    with pytest.raises(PeerTimeoutError) as caught:
        controls[1].wait(Signal.GROWN, CALL, phase="grow")
    assert caught.value.missing == [0]
    assert not rosters[1].masked
