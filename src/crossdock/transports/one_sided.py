"""Rows written straight into the receiver's memory.

Every rank owns a heap that its peers can write: a routing area where shares land, and a few equal
zones where rows land. In its header a rank names the zone it wants its rows in; naming a zone is
the permission to write there, so no further credit is needed. Since the shares told everybody all
counts, a sender knows where in the zone its rows belong and writes them to their final place.

What dispatch returns *is* that zone: it is lent to the caller and comes back when the last tensor
on it has gone. One zone is never lent; when it is the last one free, results are copied out of it.

All ranks see from the headers when the heap is too small, and enlarge it together before rows are
sent. The old heap lives as long as somebody holds results in it.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import torch

from crossdock import ops
from crossdock.config import NUM_ZONES, align
from crossdock.errors import BufferTooSmallError, TransportError
from crossdock.topology import Topology
from crossdock.transports.base import Call, Header, Heap, Routed, Shipment, check_agreement
from crossdock.transports.control import BLOCK_BYTES, Control, Signal
from crossdock.transports.heap_shm import Address, Segment, ShmHeap

__all__ = ["Capacity", "OneSided"]

_Made = TypeVar("_Made")

_PAGE = 4096
_LINE = 64
_MAX_PLANES = 4


@dataclass(frozen=True)
class Capacity:
    """How a heap is divided.

    Attributes:
        num_ranks: ranks of the group.
        share_bytes: room for one rank's share; there are two per rank.
        zone_bytes: room for the rows of one call.
    """

    num_ranks: int
    share_bytes: int = 0
    zone_bytes: int = 0

    @classmethod
    def of_bytes(cls, num_ranks: int, nbytes: int) -> Capacity:
        """The division of a heap of about `nbytes` bytes: a sixteenth for routing."""
        share = nbytes // 16 // (2 * num_ranks) // _LINE * _LINE
        zone = (nbytes - 2 * num_ranks * share) // NUM_ZONES // _PAGE * _PAGE
        return cls(num_ranks, share, max(zone, 0))

    def covering(self, headers: Sequence[Header]) -> Capacity:
        """Room for these calls too, if every rank has as many tokens as the largest of them."""
        tokens = max(max(told.num_tokens, told.reserve_tokens) for told in headers)
        row_bytes = max(max(told.row_bytes, told.return_bytes) for told in headers)
        share = align(max(told.share_bytes for told in headers), _LINE)
        zone = align(self.num_ranks * tokens * row_bytes + _MAX_PLANES * _LINE, _PAGE)
        if share <= self.share_bytes and zone <= self.zone_bytes:
            return self
        return Capacity(self.num_ranks, max(share, self.share_bytes), max(zone, self.zone_bytes))

    def enlarged(self) -> Capacity:
        """A quarter more, so that slowly growing calls do not grow the heap each time."""
        return replace(
            self,
            share_bytes=align(self.share_bytes * 5 // 4, _LINE),
            zone_bytes=align(self.zone_bytes * 5 // 4, _PAGE),
        )

    @property
    def zones_begin(self) -> int:
        """Byte offset of the first zone."""
        return align(2 * self.num_ranks * self.share_bytes, _PAGE)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole heap."""
        return self.zones_begin + NUM_ZONES * self.zone_bytes

    def share_at(self, call: Call, src: int) -> int:
        """Byte offset of the share that rank `src` sends in this call."""
        return ((call.sequence % 2) * self.num_ranks + src) * self.share_bytes

    def zone_at(self, zone: int) -> int:
        """Byte offset of a zone."""
        return self.zones_begin + zone * self.zone_bytes


class _Generation:
    """One heap of all ranks, from one growth to the next."""

    def __init__(self, heap: Heap, capacity: Capacity, rank: int) -> None:
        self.capacity = capacity
        self._heap = heap
        self._rank = rank
        self.free = deque(range(NUM_ZONES))

    def share(self, call: Call, *, src: int, dst: int) -> torch.Tensor:
        """Where rank `src` leaves its share for rank `dst`."""
        begin = self.capacity.share_at(call, src)
        return self._heap.peer(dst)[begin : begin + self.capacity.share_bytes]

    def zone(self, rank: int, zone: int) -> torch.Tensor:
        """A zone of a rank, as bytes."""
        begin = self.capacity.zone_at(zone)
        return self._heap.peer(rank)[begin : begin + self.capacity.zone_bytes]

    def lend(self, zone: int, nbytes: int) -> torch.Tensor:
        """The beginning of a zone of this rank, which is free again once no tensor refers to it."""
        begin = self.capacity.zone_at(zone)
        span = self._heap.span(self._rank, begin, begin + self.capacity.zone_bytes)
        self.free.remove(zone)
        weakref.finalize(span, self.free.append, zone).atexit = False
        return torch.frombuffer(span, dtype=torch.uint8, count=nbytes)

    def zones(self) -> torch.Tensor:
        """All zones of this rank, as bytes."""
        return self._heap.peer(self._rank)[self.capacity.zones_begin :]


class OneSided:
    """A transport over memory that all ranks can address.

    Args:
        topology: the group.
        reserve: makes this rank's segment of so many bytes.
        join: makes a heap of the segments of all ranks.
        start_bytes: size of the first heap; 0 to wait for the first call.
        max_bytes: limit of the heap of one rank; 0 for none.

    Collective: making one. Sync: waits for all ranks, as long as the group does.
    """

    name = "one_sided"
    device_types: tuple[str, ...] = ("cpu",)

    def __init__(
        self,
        topology: Topology,
        *,
        reserve: Callable[[int], Segment] = Segment,
        join: Callable[[Segment, Sequence[Address]], Heap] = ShmHeap,
        start_bytes: int = 0,
        max_bytes: int = 0,
    ) -> None:
        self._rank, self._num_ranks = topology.rank, topology.num_ranks
        self._reserve, self._join = reserve, join
        self._max_bytes = max_bytes
        start = Capacity.of_bytes(self._num_ranks, start_bytes)
        self._control_heap = self._open(topology, self._num_ranks * BLOCK_BYTES)
        self._control = Control(self._control_heap, rank=self._rank, num_ranks=self._num_ranks)
        heap = self._open(topology, max(start.nbytes, _PAGE))
        self._current = _Generation(heap, start, self._rank)
        self._zones: list[int] = []

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
        self._control.wait(Signal.POSTED, call, phase="route", sequence=call.sequence - 1)
        self._check_limit(call, header)
        generation = self._current
        if share.numel() <= generation.capacity.share_bytes:
            self._post_share(call, share)
        self._control.post_header(call, header._replace(zone=generation.free[-1]))
        self._control.wait(Signal.POSTED, call, phase="route")
        headers = self._control.headers(call)
        check_agreement(headers, call, reason_of=lambda r: self._control.reason_of(call, r))
        if self._grow(call, headers):
            headers = [told._replace(zone=NUM_ZONES - 1) for told in headers]
            self._post_share(call, share)
            self._control.signal(Signal.SHARED, call)
            self._control.wait(Signal.SHARED, call, phase="route")
        self._zones = [told.zone for told in headers]
        return Routed(headers, self._shares(call, headers))

    def _post_share(self, call: Call, share: torch.Tensor) -> None:
        for dst in range(self._num_ranks):
            self._current.share(call, src=self._rank, dst=dst)[: share.numel()].copy_(share)

    def _shares(self, call: Call, headers: Sequence[Header]) -> list[torch.Tensor]:
        return [
            self._current.share(call, src=src, dst=self._rank)[: told.share_bytes]
            for src, told in enumerate(headers)
        ]

    def move(self, call: Call, shipment: Shipment, *, keep: bool) -> list[torch.Tensor]:
        """See `Transport.move`."""
        for step in range(1, self._num_ranks + 1):
            dst = (self._rank + step) % self._num_ranks
            begin = shipment.num_arriving(dst, before=self._rank)
            mine = slice(begin, begin + shipment.counts[self._rank][dst])
            zone = self._current.zone(dst, self._zones[dst])
            areas = _divide(zone, shipment.planes, shipment.num_arriving(dst))
            for plane, area in zip(shipment.planes, areas, strict=True):
                ops.send(plane, shipment.sends[dst], area[mine])
            self._control.signal(Signal.LANDED, call, peer=dst)
        self._control.wait(Signal.LANDED, call, phase="land")
        return self._received(shipment.planes, shipment.num_arriving(self._rank), keep=keep)

    def _received(
        self, planes: Sequence[torch.Tensor], num_rows: int, *, keep: bool
    ) -> list[torch.Tensor]:
        zone = self._zones[self._rank]
        if keep and num_rows and len(self._current.free) > 1:
            lent = self._current.lend(zone, max(_used_bytes(planes, num_rows), 1))
            return _divide(lent, planes, num_rows)
        landed = _divide(self._current.zone(self._rank, zone), planes, num_rows)
        return [ops.place(area, num_rows) for area in landed] if keep else landed

    def refuse(self, call: Call, header: Header, reason: str) -> None:
        """See `Transport.refuse`."""
        self._control.wait(Signal.POSTED, call, phase="route", sequence=call.sequence - 1)
        self._control.post_header(call, header._replace(refused=1), reason=reason)

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
        self._current = _Generation(heap, capacity, self._rank)


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


def _used_bytes(planes: Sequence[torch.Tensor], num_rows: int) -> int:
    """What `_divide` cuts off a zone."""
    sizes = (num_rows * plane.shape[1] * plane.dtype.itemsize for plane in planes)
    return sum(align(nbytes, _LINE) for nbytes in sizes)


def _divide(
    zone: torch.Tensor, planes: Sequence[torch.Tensor], num_rows: int
) -> list[torch.Tensor]:
    """Cut a zone into areas of `num_rows` rows, one like each plane."""
    areas, at = [], 0
    for plane in planes:
        nbytes = num_rows * plane.shape[1] * plane.dtype.itemsize
        areas.append(zone[at : at + nbytes].view(plane.dtype).view(num_rows, plane.shape[1]))
        at += align(nbytes, _LINE)
    return areas
