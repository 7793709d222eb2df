"""What is said of ranks that did not come to a kernel, from the words that kernels write."""

from __future__ import annotations

import ctypes

import pytest
import torch

from crossdock.device.memory import NUM_STATES
from crossdock.device.watch import Report, State
from crossdock.errors import PeerTimeoutError, TransportError
from crossdock.ops.triton import (
    expert_rows,
    expert_sends,
    expert_sums,
    links,
    rank_places,
    rank_routes,
    rank_rows,
    rank_sums,
    row_checks,
)
from crossdock.transports.symmetric import GAVE_UP

NUM_RANKS = 3
REASONS = {2: "it had enough"}
NOTHING = [[0] * NUM_STATES for _ in range(NUM_RANKS)]


def report_of(missing: dict[int, tuple[int, int, int]], why: int = 1) -> Report:
    """What a kernel has reported: by rank the state, the phase and the round; and why it failed."""
    report = Report(NUM_RANKS, torch.device("cpu"))
    assert report.is_empty()
    words = (ctypes.c_int64 * (NUM_RANKS + 1)).from_address(report.address)
    for rank, (state, phase, number) in missing.items():
        words[rank] = number << 32 | state << 8 | phase
    words[NUM_RANKS] = why
    assert not report.is_empty()
    return report


def come_to(**rounds: int) -> list[list[int]]:
    """What ranks entered: `rank_1=4` has come to round 4 of every state, others to none."""
    return [[rounds.get(f"rank_{rank}", 0)] * NUM_STATES for rank in range(NUM_RANKS)]


@pytest.mark.parametrize(
    ("state", "phase", "said"),
    [
        (State.LOW_LATENCY_DISPATCH, expert_rows.COUNTS, "low latency dispatch 13 route"),
        (State.LOW_LATENCY_DISPATCH, expert_sends.CREDIT, "low latency dispatch 13 send"),
        (State.LOW_LATENCY_DISPATCH + 1, expert_rows.ROWS, "low latency dispatch 14 land"),
        (State.LOW_LATENCY_COMBINE, expert_sums.WEIGHTS, "low latency combine 13 route"),
        (State.LOW_LATENCY_COMBINE + 1, expert_sums.SUMS, "low latency combine 14 land"),
        (State.ROUTE, rank_routes.COUNTS, "dispatch 7 route"),
        (State.SEND, rank_rows.CREDIT, "dispatch 7 send"),
        (State.PLACE, rank_places.ROWS, "dispatch 7 land"),
        (State.COMBINE, rank_sums.KEPT, "combine 7 route"),
        (State.COMBINE, rank_sums.CREDIT, "combine 7 send"),
        (State.COMBINE, rank_sums.SUMS, "combine 7 land"),
    ],
)
def test_the_call_and_the_wait_are_named(state: int, phase: object, said: str) -> None:
    """Low-latency calls take two states by turns, so that a round of each is two calls."""
    error = report_of({1: (state, int(phase.value), 7)}).error(2.5, NOTHING, REASONS.__getitem__)
    assert isinstance(error, PeerTimeoutError)
    assert f"{error.operation} {error.epoch} {error.phase}" == said
    assert error.waited_s == 2.5


def test_a_rank_that_came_is_not_missing_though_its_rows_are() -> None:
    at = (State.COMBINE, int(rank_sums.SUMS.value), 4)
    error = report_of({0: at, 2: at}).error(
        1.0, come_to(rank_0=4, rank_1=4, rank_2=3), REASONS.__getitem__
    )
    assert error.missing == [2]


def test_all_that_did_not_come_are_named_also_where_one_alone_was_waited_for() -> None:
    at = (State.LOW_LATENCY_DISPATCH, int(expert_rows.ROWS.value), 4)
    assert report_of({0: at}).error(1.0, come_to(rank_1=4), REASONS.__getitem__).missing == [0, 2]


LAST, FIRST = 2**31 - 1, -(2**31)
"""Numbers of rounds on a device, one after the other."""


def test_behind_the_last_number_the_first_one_is_later() -> None:
    at = (State.COMBINE, int(rank_sums.SUMS.value))
    entered = come_to(rank_0=LAST, rank_1=FIRST, rank_2=LAST)
    assert report_of({2: (*at, LAST)}).error(1.0, entered, REASONS.__getitem__).missing == [2]
    error = report_of({2: (*at, FIRST)}).error(1.0, entered, REASONS.__getitem__)
    assert error.missing == [0, 2]
    assert error.epoch == LAST + 1
    assert error.peers[1].endswith(f"combine {LAST + 1}")


def test_where_all_came_those_are_named_whose_rows_are_missing() -> None:
    at = (State.COMBINE, int(rank_sums.SUMS.value), 4)
    everybody = come_to(rank_0=4, rank_1=4, rank_2=4)
    assert report_of({1: at}).error(1.0, everybody, REASONS.__getitem__).missing == [1]


def test_who_waits_for_rows_asks_who_came_to_send_them() -> None:
    entered = come_to(rank_0=4, rank_1=4, rank_2=4)
    entered[2][State.SEND] = 3
    for rounds in entered:
        rounds[State.PLACE] = 0  # nobody tells that it places
    at = (State.PLACE, int(rank_places.ROWS.value), 4)
    assert report_of({2: at}).error(1.0, entered, REASONS.__getitem__).missing == [2]


def test_it_is_told_what_every_rank_has_come_to() -> None:
    entered = [list(rounds) for rounds in NOTHING]
    entered[0][State.LOW_LATENCY_DISPATCH : State.LOW_LATENCY_DISPATCH + 2] = [4, 3]
    entered[0][State.COMBINE] = 5
    at = (State.COMBINE, int(rank_sums.SUMS.value), 6)
    error = report_of({1: at}).error(1.0, entered, REASONS.__getitem__)
    assert error.peers[0] == "has come to low latency dispatch 7, combine 5"
    assert error.peers[1] == "nothing yet"


def test_damaged_rows_are_named_with_who_sent_them() -> None:
    at = (State.PLACE, int(row_checks.DAMAGE.value), 7)
    error = report_of({0: at, 2: at}).error(1.0, NOTHING, REASONS.__getitem__)
    assert type(error) is TransportError
    assert str(error) == "dispatch 7: rows of ranks [0, 2] have come damaged"


def test_kernels_and_the_host_mean_the_same_by_giving_up() -> None:
    assert links.GAVE_UP.value == GAVE_UP


def test_a_rank_that_gave_up_is_named() -> None:
    error = report_of({}, why=GAVE_UP + 2).error(1.0, NOTHING, REASONS.__getitem__)
    assert type(error) is TransportError
    assert "rank 2 gave up" in str(error)
    assert str(error).endswith(REASONS[2])
