"""How the heap of a device buffer is divided, and when a larger one is made."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from crossdock.device import memory
from crossdock.device.memory import (
    BACK_UNIT,
    NUM_STATES,
    NUM_WELCOME_WORDS,
    UNIT,
    DeviceCapacity,
    Generation,
    Memory,
    Plan,
)
from crossdock.errors import BufferTooSmallError, TransportError
from crossdock.transports.header import Call, Operation

LINE = 128
CAPACITIES = [
    DeviceCapacity(),
    DeviceCapacity(slots=5, row_bytes=96, back_bytes=80, topk=3, experts=7),
    DeviceCapacity(num_tokens=19, token_bytes=144, sum_bytes=112, experts=2),
    DeviceCapacity(
        slots=128,
        row_bytes=7504,
        back_bytes=14336,
        num_tokens=4096,
        token_bytes=14336,
        choice_bytes=64,
        sum_bytes=14352,
        topk=8,
        experts=64,
    ),
]


class Piece(NamedTuple):
    """A part of a heap: what it is, where it begins, and how many bytes its owner uses."""

    name: str
    begin: int
    nbytes: int


def pieces_of(plan: Plan, have: DeviceCapacity, num_ranks: int) -> list[Piece]:
    """Everything that the records which kernels are given say that there is."""
    rows, tokens = num_ranks * have.slots, num_ranks * have.num_tokens
    flags = num_ranks * -(-have.num_tokens // UNIT)
    back_flags = flags * UNIT // BACK_UNIT
    found = [
        Piece("watch", plan.watch, 8 * (8 + num_ranks)),
        Piece("credits", plan.credits, 2 * 4 * num_ranks * NUM_STATES),
        Piece("welcome", plan.welcome, 8 * NUM_WELCOME_WORDS * num_ranks),
        Piece("rows.landing", plan.rows.landing, tokens * have.token_bytes),
        Piece("rows.heads", plan.rows.heads, 4 * tokens),
        Piece("rows.choices", plan.rows.choices, tokens * have.choice_bytes),
        Piece("rows.flags", plan.rows.flags, 4 * flags),
        Piece("rows.numbered", plan.rows.numbered, 2 * 4 * num_ranks),
        Piece("rows.told", plan.rows.told, 8 * num_ranks * (num_ranks + 2)),
        Piece("rows.counts", plan.rows.counts, 8 * num_ranks * have.experts),
        Piece("back.landing", plan.back.landing, tokens * have.sum_bytes),
        Piece("back.flags", plan.back.flags, 4 * back_flags),
        Piece("back.kept", plan.back.kept, 8 * num_ranks),
    ]
    for number, (there, back) in enumerate(zip(plan.zones, plan.returns, strict=True)):
        found += [
            Piece(f"zones[{number}].landing", there.landing, rows * have.row_bytes),
            Piece(f"zones[{number}].flags", there.flags, 4 * rows),
            Piece(f"zones[{number}].counts", there.counts, 8 * num_ranks * have.experts),
            Piece(f"zones[{number}].told", there.told, 16 * (num_ranks + 1)),
            Piece(f"returns[{number}].landing", back.landing, rows * have.back_bytes),
            Piece(f"returns[{number}].flags", back.flags, 4 * rows),
            Piece(f"returns[{number}].weights", back.weights, 8 * rows * have.topk),
        ]
    return found


@pytest.mark.parametrize("have", CAPACITIES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_the_pieces_of_a_heap_do_not_meet(have: DeviceCapacity, num_ranks: int) -> None:
    plan = Plan.of(have, num_ranks)
    pieces = sorted(pieces_of(plan, have, num_ranks), key=lambda piece: (piece[1], piece[2]))
    for piece, behind in itertools.pairwise(pieces):
        assert piece.begin + piece.nbytes <= behind.begin, f"{piece} meets {behind}"
    for piece in pieces:
        assert piece.begin % LINE == 0, f"{piece} shares a line with what is before it"
    assert pieces[-1].begin + pieces[-1].nbytes <= plan.nbytes


@pytest.mark.parametrize("have", CAPACITIES)
def test_behind_every_piece_is_a_line_that_nobody_writes_to(have: DeviceCapacity) -> None:
    plan = Plan.of(have, 3)
    pieces = pieces_of(plan, have, 3)
    guards = [Piece("guard", begin, LINE) for begin in plan.guards]
    assert len(guards) == len(pieces)
    everything = sorted(pieces + guards, key=lambda piece: piece.begin)
    for piece, guard in zip(everything[::2], everything[1::2], strict=True):
        assert guard.name == "guard" != piece.name
        assert 0 <= guard.begin - (piece.begin + piece.nbytes) < LINE


@pytest.mark.parametrize("guarded", [True, False])
def test_what_is_written_beyond_its_place_is_found_where_it_is_guarded(guarded: bool) -> None:
    held = Memory(Alone(), guarded=guarded)
    have = covered(held, DeviceCapacity(slots=4, row_bytes=64))
    have.check_guards()
    end = have.plan.zones[1].landing + 4 * 64
    have.heap.peer(0)[end] += 1
    with pytest.raises(TransportError, match=str(end)) if guarded else nullcontext():
        have.check_guards()


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_a_heap_has_room_for_what_was_wanted_and_little_more(num_ranks: int) -> None:
    have = CAPACITIES[-1]
    pieces = pieces_of(Plan.of(have, num_ranks), have, num_ranks)
    used = sum(piece.nbytes for piece in pieces)
    assert used <= Plan.of(have, num_ranks).nbytes <= 1.001 * used


def test_a_heap_without_calls_is_small() -> None:
    assert Plan.of(DeviceCapacity(), 8).nbytes < 32 << 10


def test_chunks_are_rounded_up() -> None:
    numbers = (0, 1, UNIT, UNIT + 1)
    assert [DeviceCapacity(num_tokens=each).num_flags for each in numbers] == [0, 1, 1, 2]


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(CAPACITIES, 2)))
def test_room_for_two_is_room_for_each(one: DeviceCapacity, other: DeviceCapacity) -> None:
    both = one.covering(other)
    assert both.covers(one)
    assert both.covers(other)
    assert both.covering(one) is both
    assert other.covering(one) == both


@pytest.mark.parametrize("name", list(vars(CAPACITIES[-1])))
def test_a_heap_is_too_small_if_it_is_in_one_respect(name: str) -> None:
    have = CAPACITIES[-1]
    wanted = DeviceCapacity(**{name: getattr(have, name) + 1})
    assert not have.covers(wanted)
    assert getattr(have.covering(wanted), name) == getattr(wanted, name)


class Alone:
    """What `Memory` needs of a transport: heaps of one rank, as many as it asks for."""

    def __init__(self, max_bytes: int = 0) -> None:
        self.topology = SimpleNamespace(rank=0, num_ranks=1)
        self.device = torch.device("cpu")
        self.max_bytes = max_bytes
        self.can_shrink = False
        self.masks = None
        self.made: list[int] = []

    def reserve(self, nbytes: int, call: Call) -> SimpleNamespace:
        self.made.append(nbytes)
        own = torch.zeros(nbytes, dtype=torch.uint8)
        return SimpleNamespace(nbytes=nbytes, addresses=[own.data_ptr()], peer=lambda rank: own)


def covered(held: Memory, wanted: DeviceCapacity) -> Generation:
    return held.covering(wanted, 0, Call(Operation.DISPATCH, 1, 1.0))


def test_a_heap_is_kept_until_a_call_needs_more() -> None:
    transport = Alone()
    held = Memory(transport)
    small, large = DeviceCapacity(slots=4, row_bytes=64), DeviceCapacity(slots=8, back_bytes=32)
    first = covered(held, small)
    assert covered(held, small) is first
    second = covered(held, large)
    assert covered(held, small) is second
    assert second.capacity == small.covering(large)
    assert transport.made == [first.plan.nbytes, second.plan.nbytes]


def test_a_limit_holds_and_leaves_what_there_is() -> None:
    wanted = DeviceCapacity(slots=4, row_bytes=64)
    limit = Plan.of(wanted, 1).nbytes
    held = Memory(Alone(max_bytes=limit))
    covered(held, wanted)
    with pytest.raises(BufferTooSmallError) as raised:
        covered(held, DeviceCapacity(slots=400))
    assert raised.value.argument == "max_buffer_bytes"
    assert raised.value.have_bytes == limit < raised.value.needed_bytes
    assert held.current.capacity == wanted


def test_nothing_grows_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    held, wanted = Memory(Alone()), DeviceCapacity(num_tokens=8, token_bytes=64)
    have = covered(held, wanted)
    monkeypatch.setattr(memory, "is_capturing", lambda: True)
    assert covered(held, wanted) is have
    with pytest.raises(BufferTooSmallError, match="capture"):
        covered(held, DeviceCapacity(num_tokens=9))


def test_rows_land_in_what_is_shown_and_nothing_else_does() -> None:
    held = Memory(Alone())
    assert held.local() is None
    have = covered(held, DeviceCapacity(num_tokens=8, token_bytes=64, sum_bytes=64))
    shown = held.local()
    begin = shown.data_ptr() - have.heap.peer(0).data_ptr()
    inside = {
        piece.name
        for piece in pieces_of(have.plan, have.capacity, 1)
        if piece.nbytes and begin <= piece.begin < begin + shown.numel()
    }
    assert inside == {"rows.landing"}
    assert shown.numel() >= 8 * 64
    assert not [at for at in have.plan.guards if begin <= at < begin + shown.numel()]


def test_what_is_cleared_is_given_up() -> None:
    held = Memory(Alone())
    covered(held, DeviceCapacity(slots=1))
    held.keep()
    held.clear()
    assert held.current is None
    assert held.local() is None
