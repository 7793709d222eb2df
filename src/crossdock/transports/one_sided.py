"""Rows written straight into the receiver's memory.

Every rank owns a heap that its peers can write: a routing area where shares land, and a few equal
zones where rows land. In its header a rank names the zone it wants its rows in; naming a zone is
the permission to write there, so no further credit is needed. Where the shares told everybody all
counts, a sender knows where in the zone its rows belong and writes them to their final place; in a
low-latency call every sender has a region of its own in the zone.

What dispatch returns *is* that zone: it is lent to the caller and comes back when the last tensor
on it has gone. One zone is never lent; when it is the last one free, results are copied out of it.
Landing zones are lent until the hook has placed their rows; there are enough for all calls that may
be in flight.

All ranks see from the headers when the heap is too small, and enlarge it together before rows are
sent. The old heap lives as long as somebody holds results in it, or waits for rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar, cast

import torch

from crossdock import ops
from crossdock.config import NUM_LANDING_ZONES, NUM_ZONES
from crossdock.errors import BufferTooSmallError, TransportError, UnsupportedError
from crossdock.topology import Topology
from crossdock.transports.base import Heap, Landed, Masks, Routed, Shipment
from crossdock.transports.control import BLOCK_BYTES, Control, Signal
from crossdock.transports.header import Call, Header, check_agreement
from crossdock.transports.heap_shm import Address, Segment, ShmHeap
from crossdock.transports.roster import MAX_MASKABLE_RANKS, Roster
from crossdock.transports.zones import Capacity, Generation, divide, used_bytes

__all__ = ["OneSided"]

_Made = TypeVar("_Made")

_PAGE = 4096


class _Landing(NamedTuple):
    """Rows on their way into a zone of this rank.

    Attributes:
        lent: the zone, if rows land in slots; packed ones are lent when they are there.
        eras, absent: how things stood in the roster when the rows were sent.
    """

    control: Control
    roster: Roster
    call: Call
    shipment: Shipment
    generation: Generation
    zone: int
    lent: torch.Tensor
    eras: tuple[int, ...]
    absent: frozenset[int]
    rank: int

    def land(self, *, keep: bool) -> Landed:
        """See `Landing.land`."""
        among = [peer for peer in range(len(self.eras)) if peer not in self._lost()]
        waited_us = self.control.wait(Signal.LANDED, self.call, phase="land", among=among)
        lost = self._lost()
        if self.shipment.num_slots:
            return Landed(self._regions(lost), waited_us, lost)
        return Landed([[rows] for rows in self._packed(keep=keep)], waited_us, lost)

    def _lost(self) -> frozenset[int]:
        """Ranks whose rows do not count: masked before the call, or at some time since."""
        now = self.roster.eras
        lost = {peer for peer, era in enumerate(self.eras) if now[peer] != era}
        alone = self.rank in lost or self.rank in self.absent
        return frozenset(range(len(now))) if alone else self.absent | lost

    def _regions(self, lost: frozenset[int]) -> list[list[torch.Tensor]]:
        """For each plane the rows of every rank, in its region of the lent zone."""
        planes = self.shipment.planes
        size = self.generation.capacity.region_bytes
        pieces = []
        for src, row in enumerate(self.shipment.counts):
            region = self.lent[src * size : (src + 1) * size]
            pieces.append(divide(region, planes, 0 if src in lost else row[self.rank]))
        return [list(of_plane) for of_plane in zip(*pieces, strict=True)]

    def _packed(self, *, keep: bool) -> list[torch.Tensor]:
        planes, num_rows = self.shipment.planes, self.shipment.num_arriving(self.rank)
        if keep and num_rows and len(self.generation.free) > 1:
            lent = self.generation.lend(self.zone, max(used_bytes(planes, num_rows), 1))
            return divide(lent, planes, num_rows)
        landed = divide(self.generation.zone(self.rank, self.zone), planes, num_rows)
        return [ops.place(area, num_rows) for area in landed] if keep else landed


class OneSided:
    """A transport over memory that all ranks can address.

    Args:
        topology: the group.
        reserve: makes this rank's segment of so many bytes.
        join: makes a heap of the segments of all ranks.
        start: division of the first heap; None to wait for the first call.
        max_bytes: limit of the heap of one rank; 0 for none.
        can_shrink: whether calls that can go on without a rank that is late.

    Collective: making one. Sync: waits for all ranks, as long as the group does.
    """

    name = "one_sided"
    device_types: tuple[str, ...] = ("cpu",)
    stream: torch.cuda.Stream | None = None

    def __init__(
        self,
        topology: Topology,
        *,
        reserve: Callable[[int], Segment] = Segment,
        join: Callable[[Segment, Sequence[Address]], Heap] = ShmHeap,
        start: Capacity | None = None,
        max_bytes: int = 0,
        can_shrink: bool = False,
    ) -> None:
        self._rank, self._num_ranks = topology.rank, topology.num_ranks
        self._reserve, self._join = reserve, join
        self._max_bytes = max_bytes
        if can_shrink and self._num_ranks > MAX_MASKABLE_RANKS:
            raise TransportError(f"masks are for at most {MAX_MASKABLE_RANKS} ranks")
        start = start or Capacity(self._num_ranks)
        self._roster = Roster(self._rank, self._num_ranks, can_shrink=can_shrink)
        self._control_heap = self._open(topology, self._num_ranks * BLOCK_BYTES)
        self._control = Control(
            self._control_heap, rank=self._rank, num_ranks=self._num_ranks, roster=self._roster
        )
        heap = self._open(topology, max(start.nbytes, _PAGE))
        self._current = Generation(heap, start, self._rank)
        self._zones: list[int] = []
        self.masks: Masks | None = _Masks(self._roster, self._control) if can_shrink else None

    def _open(self, topology: Topology, nbytes: int) -> Heap:
        """Open a heap over the bootstrap; every rank raises if one cannot."""
        segment = _try(lambda: self._reserve(nbytes))
        told = str(segment) if isinstance(segment, Exception) else tuple(segment.address)
        everyone = topology.allgather(told)
        _raise_any({r: text for r, text in enumerate(everyone) if isinstance(text, str)})
        addresses = [Address(*address) for address in everyone]
        heap = _try(lambda: self._join(cast("Segment", segment), addresses))
        problems = topology.allgather(str(heap) if isinstance(heap, Exception) else "")
        _raise_any({r: text for r, text in enumerate(problems) if text})
        return cast("Heap", heap)

    def route(self, call: Call, header: Header, share: torch.Tensor) -> Routed:
        """See `Transport.route`."""
        if self._roster.is_alone:
            return self._alone(call)
        self._control.wait_for_call_before(call)
        self._check_limit(call, header)
        if share.numel() <= self._current.capacity.share_bytes:
            self._post_share(call, share)
        told = header._replace(zone=self._free_zone(header), masked=self._roster.bits)
        self._control.post_header(call, told)
        waited_us = self._control.wait(Signal.POSTED, call, phase="route")
        self._roster.settle_in()
        if self._roster.is_alone:
            return self._alone(call)
        self._control.exclude(self._roster.masked, call)
        headers = self._agreed(call)
        if self._grow(call, headers):
            last = (NUM_LANDING_ZONES if header.num_slots else NUM_ZONES) - 1
            headers = [told._replace(zone=last) for told in headers]
            self._post_share(call, share)
            self._control.signal(Signal.SHARED, call)
            self._control.wait(Signal.SHARED, call, phase="route")
        self._zones = [told.zone for told in headers]
        absent, eras = self._roster.absent(), tuple(self._roster.eras)
        return Routed(headers, self._shares(call, headers), waited_us, absent, eras)

    def _free_zone(self, header: Header) -> int:
        """The zone where this rank wants its rows."""
        free = self._current.free_landing if header.num_slots else self._current.free
        return free[-1]

    def _agreed(self, call: Call) -> list[Header]:
        """The headers of a call that all ranks make alike."""
        headers, absent = self._control.headers(call), self._roster.absent()
        if absent and not call.operation.can_shrink:
            raise UnsupportedError(f"{call} needs all ranks, but {sorted(absent)} are masked")
        check_agreement(
            headers,
            call,
            reason_of=lambda rank: self._control.reason_of(call, rank),
            masked=absent,
        )
        return headers

    def _alone(self, call: Call) -> Routed:
        """What a masked rank learns: nothing."""
        if not call.operation.can_shrink:
            raise UnsupportedError(f"{call}: the other ranks have masked this one")
        nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
        every, num = self._roster.absent(), self._num_ranks
        eras = tuple(self._roster.eras)
        return Routed([Header()] * num, [nothing] * num, [0] * num, every, eras)

    def _post_share(self, call: Call, share: torch.Tensor) -> None:
        for dst in range(self._num_ranks):
            self._current.share(call, src=self._rank, dst=dst)[: share.numel()].copy_(share)

    def _shares(self, call: Call, headers: Sequence[Header]) -> list[torch.Tensor]:
        return [
            self._current.share(call, src=src, dst=self._rank)[: told.share_bytes]
            for src, told in enumerate(headers)
        ]

    def send(self, call: Call, shipment: Shipment) -> _Landing:
        """See `Transport.send`."""
        landing = self._landing(call, shipment)
        for step in range(1, self._num_ranks + 1):
            dst = (self._rank + step) % self._num_ranks
            if dst in landing.absent:
                continue
            areas = self._areas(shipment, dst)
            for plane, area in zip(shipment.planes, areas, strict=True):
                ops.send(plane, shipment.sends[dst], area)
            self._control.signal(Signal.LANDED, call, peer=dst)
        return landing

    def _landing(self, call: Call, shipment: Shipment) -> _Landing:
        alone = self._roster.is_alone
        zone = 0 if alone else self._zones[self._rank]
        lent = torch.empty(0, dtype=torch.uint8, device="cpu")
        if shipment.num_slots and not alone:
            lent = self._current.lend_landing(zone)
        return _Landing(
            self._control,
            self._roster,
            call,
            shipment,
            self._current,
            zone,
            lent,
            eras=tuple(self._roster.eras),
            absent=self._roster.absent(),
            rank=self._rank,
        )

    def _areas(self, shipment: Shipment, dst: int) -> list[torch.Tensor]:
        """Where the rows of this rank belong in the memory of another."""
        num_rows = shipment.counts[self._rank][dst]
        if shipment.num_slots:
            region = self._current.region(dst, self._zones[dst], src=self._rank)
            return divide(region, shipment.planes, num_rows)
        begin = shipment.num_arriving(dst, before=self._rank)
        zone = self._current.zone(dst, self._zones[dst])
        areas = divide(zone, shipment.planes, shipment.num_arriving(dst))
        return [area[begin : begin + num_rows] for area in areas]

    def refuse(self, call: Call, header: Header, reason: str) -> None:
        """See `Transport.refuse`."""
        if self._roster.is_alone:
            return
        self._control.wait_for_call_before(call)
        told = header._replace(refused=1, masked=self._roster.bits)
        self._control.post_header(call, told, reason=reason)
        self._roster.settle_in()

    def fail(self, call: Call, error: BaseException) -> None:
        """See `Transport.fail`."""
        self._control.fail(call, error)

    def memory(self) -> Mapping[str, int]:
        """See `Transport.memory`."""
        capacity = self._current.capacity
        return {
            "control": self._control_heap.nbytes,
            "routing": capacity.zones_begin,
            "zones": NUM_ZONES * capacity.zone_bytes,
            "landing": NUM_LANDING_ZONES * capacity.landing_bytes,
        }

    def local_memory(self) -> torch.Tensor | None:
        """See `Transport.local_memory`. Zones that are lent to the caller are part of it."""
        return self._current.zones()

    def close(self) -> None:
        """See `Transport.close`. The memory goes with the last tensor on it."""
        del self._current, self._control, self._control_heap

    def _check_limit(self, call: Call, header: Header) -> None:
        """Refuse what this rank alone knows to exceed the limit."""
        wanted = self._current.capacity.covering([header])
        if not self._max_bytes or wanted.nbytes <= self._max_bytes:
            return
        needed = header._replace(needed_bytes=wanted.nbytes, have_bytes=self._max_bytes)
        self.refuse(call, needed, "max_buffer_bytes")
        raise BufferTooSmallError(
            wanted.nbytes, self._max_bytes, argument="max_buffer_bytes", rank=self._rank
        )

    def _grow(self, call: Call, headers: Sequence[Header]) -> bool:
        """Enlarge the heap on all ranks if the headers ask for it; whether that was done."""
        have = self._current.capacity
        wanted = have.covering(headers)
        if wanted is have:
            return False
        if self._roster.absent():
            raise BufferTooSmallError(
                wanted.nbytes, have.nbytes, argument="num_rdma_bytes", rank=self._rank
            )
        roomy = wanted.enlarged() if have.zone_bytes else wanted
        fits = not self._max_bytes or roomy.nbytes <= self._max_bytes
        self._replace_heap(call, roomy if fits else wanted)
        return True

    def _replace_heap(self, call: Call, capacity: Capacity) -> None:
        """Reserve and join a heap over the control words; every rank raises if one cannot."""
        segment = _try(lambda: self._reserve(capacity.nbytes))
        failed = isinstance(segment, Exception)
        address = (
            Address(0, 0, capacity.nbytes) if isinstance(segment, Exception) else segment.address
        )
        self._control.post_note(call, [*address, int(failed)])
        self._control.wait(Signal.GROWN, call, phase="grow")
        notes = self._control.notes()
        _raise_any({r: f"{note[2]} bytes" for r, note in enumerate(notes) if note[3]})
        heap = self._join(cast("Segment", segment), [Address(*note[:3]) for note in notes])
        self._current = Generation(heap, capacity, self._rank)


def _try(make: Callable[[], _Made]) -> _Made | Exception:
    """What `make` makes, or why it could not."""
    try:
        return make()
    except (OSError, TransportError) as error:
        return error


def _raise_any(problems: Mapping[int, str]) -> None:
    if problems:
        told = "; ".join(f"rank {rank}: {text}" for rank, text in problems.items())
        raise TransportError(f"shared memory could not be had: {told}")


class _Masks(NamedTuple):
    """See `Masks`."""

    roster: Roster
    control: Control

    def mask(self, rank: int) -> None:
        self.roster.mask(rank)

    def unmask(self, rank: int) -> None:
        self.roster.unmask(rank)

    def masked(self) -> frozenset[int]:
        return self.roster.masked

    def catch_up(self, call: Call) -> int:
        return self.control.catch_up(call) if self.roster.returning else call.sequence
