"""Who takes part: masks, how they are taken over, and what was begun in another era."""

from __future__ import annotations

import pytest

from crossdock.transports.header import Call, Header, Operation
from crossdock.transports.roster import Roster

CALL = Call(Operation.LOW_LATENCY_DISPATCH, 7, 1.0)


def showing(*masked: int, sequence: int = 7) -> Header:
    return Header(sequence=sequence, masked=sum(1 << rank for rank in masked))


def test_a_mask_that_is_heard_of_is_taken_over() -> None:
    roster = Roster(0, 4, can_shrink=True)
    roster.hear(1, showing(2), CALL)
    assert roster.masked == roster.absent() == {2}
    assert roster.bits == 4
    assert roster.eras == [0, 0, 1, 0]


def test_what_a_masked_rank_shows_does_not_count() -> None:
    roster = Roster(0, 4, can_shrink=True)
    roster.mask(2)
    roster.hear(2, showing(1), CALL)
    assert roster.masked == {2}


def test_an_earlier_header_does_not_count() -> None:
    roster = Roster(0, 4, can_shrink=True)
    roster.hear(1, showing(2, sequence=6), CALL)
    assert not roster.masked


@pytest.mark.parametrize("header", [showing(0), showing(sequence=9)])
def test_who_is_masked_or_left_behind_is_alone(header: Header) -> None:
    roster = Roster(0, 4, can_shrink=True)
    roster.hear(1, header, CALL)
    assert roster.is_alone
    assert roster.absent() == {0, 1, 2, 3}
    roster.unmask(0)
    assert roster.returning
    assert not roster.absent()


def test_a_rank_that_returns_owes_nothing_from_before() -> None:
    roster = Roster(0, 4, can_shrink=True)
    roster.mask(3)
    roster.mask(3)
    roster.unmask(3)
    assert roster.newcomers == {3}
    assert roster.eras[3] == 1
    roster.mask(3)
    assert not roster.newcomers
    assert roster.eras[3] == 2


@pytest.mark.parametrize(
    ("num_ranks", "masked", "late", "may"),
    [(4, [], [1], True), (4, [], [1, 2], True), (4, [], [1, 2, 3], False), (4, [1], [2, 3], False),
     (4, [1], [2], True), (2, [], [1], True), (3, [], [1, 2], False), (4, [1], [1, 2], True)],
)  # fmt: skip
def test_a_few_do_not_go_on_without_the_many(
    num_ranks: int, masked: list[int], late: list[int], may: bool
) -> None:
    roster = Roster(0, num_ranks, can_shrink=True)
    for rank in masked:
        roster.mask(rank)
    assert roster.may_drop(late) == may


def test_who_comes_back_counts_on_those_that_the_others_count_on() -> None:
    roster = Roster(0, 4, can_shrink=True)
    for rank in (0, 1, 2):
        roster.mask(rank)
    roster.unmask(0)
    roster.come_back(9, showing(3, sequence=11))
    assert roster.masked == {3}
    assert roster.newcomers == {1, 2}
    assert roster.eras == [2, 1, 1, 1]
    assert roster.settled == 9
    assert not roster.returning


def test_who_was_not_missed_comes_back_as_it_was() -> None:
    roster = Roster(0, 4, can_shrink=True)
    roster.mask(2)
    roster.unmask(0)
    assert roster.returning
    roster.come_back(0, None)
    assert roster.masked == {2}
    assert not roster.returning
    assert roster.eras == [0, 0, 1, 0]


def test_dropping_is_masking() -> None:
    roster = Roster(0, 4, can_shrink=True)
    roster.drop([1, 3], CALL)
    assert roster.masked == {1, 3}
