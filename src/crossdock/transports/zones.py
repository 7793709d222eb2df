"""How a heap that all ranks can address is divided: where shares land, and where rows do.

Rows of calls that know all counts land packed in a *zone*; those of low-latency calls land in a
*landing zone* with a region of its own for every source rank. A region's place depends on the heap
alone, not on the call, so a rank that writes late, after the others went on without it, writes
where nobody else does.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from crossdock.config import NUM_LANDING_ZONES, NUM_ZONES, align
from crossdock.transports.base import Heap
from crossdock.transports.header import Call, Header

__all__ = ["Capacity", "Generation", "divide", "used_bytes"]

_PAGE = 4096
_LINE = 64
_MAX_PLANES = 4


@dataclass(frozen=True)
class Capacity:
    """How a heap is divided.

    Attributes:
        num_ranks: ranks of the group.
        share_bytes: room for one rank's share; there are two per rank.
        zone_bytes: room for the packed rows of one call.
        region_bytes: room for the rows of one source rank in a landing zone.
    """

    num_ranks: int
    share_bytes: int = 0
    zone_bytes: int = 0
    region_bytes: int = 0

    @classmethod
    def of_bytes(cls, num_ranks: int, zone_bytes: int, landing_bytes: int) -> Capacity:
        """The division of so many bytes for either kind of call: a sixteenth is for routing."""
        share = (zone_bytes + landing_bytes) // 16 // (2 * num_ranks) // _LINE * _LINE
        zone = zone_bytes * 15 // 16 // NUM_ZONES // _PAGE * _PAGE
        region = landing_bytes * 15 // 16 // NUM_LANDING_ZONES // num_ranks // _PAGE * _PAGE
        return cls(num_ranks, share, zone, region)

    def covering(self, headers: Sequence[Header]) -> Capacity:
        """Room for these calls too, if every rank has as many tokens as the largest of them."""
        row_bytes = max(max(told.row_bytes, told.return_bytes) for told in headers)
        num_slots = max(told.num_slots for told in headers)
        tokens = max(max(told.num_tokens, told.reserve_tokens) for told in headers)
        zone = align(self.num_ranks * tokens * row_bytes + _MAX_PLANES * _LINE, _PAGE)
        region = align(num_slots * row_bytes + _MAX_PLANES * _LINE, _PAGE)
        share = align(max(_share_bytes(told) for told in headers), _LINE)
        wanted = Capacity(
            self.num_ranks,
            max(share, self.share_bytes),
            self.zone_bytes if num_slots else max(zone, self.zone_bytes),
            max(region, self.region_bytes) if num_slots else self.region_bytes,
        )
        return self if wanted == self else wanted

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
    def landing_bytes(self) -> int:
        """Bytes of a landing zone."""
        return self.num_ranks * self.region_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the whole heap."""
        return self.landing_at(NUM_LANDING_ZONES)

    def share_at(self, call: Call, src: int) -> int:
        """Byte offset of the share that rank `src` sends in this call."""
        return ((call.sequence % 2) * self.num_ranks + src) * self.share_bytes

    def zone_at(self, zone: int) -> int:
        """Byte offset of a zone."""
        return self.zones_begin + zone * self.zone_bytes

    def landing_at(self, zone: int) -> int:
        """Byte offset of a landing zone."""
        return self.zone_at(NUM_ZONES) + zone * self.landing_bytes


class Generation:
    """One heap of all ranks, from one growth to the next.

    Attributes:
        capacity: how it is divided.
        free: zones of this rank that nobody uses.
        free_landing: landing zones of this rank that nobody uses.
    """

    def __init__(self, heap: Heap, capacity: Capacity, rank: int) -> None:
        self.capacity = capacity
        self._heap = heap
        self._rank = rank
        self.free = deque(range(NUM_ZONES))
        self.free_landing = deque(range(NUM_LANDING_ZONES))

    def share(self, call: Call, *, src: int, dst: int) -> torch.Tensor:
        """Where rank `src` leaves its share for rank `dst`."""
        begin = self.capacity.share_at(call, src)
        return self._heap.peer(dst)[begin : begin + self.capacity.share_bytes]

    def zone(self, rank: int, zone: int) -> torch.Tensor:
        """A zone of a rank, as bytes."""
        begin = self.capacity.zone_at(zone)
        return self._heap.peer(rank)[begin : begin + self.capacity.zone_bytes]

    def region(self, rank: int, zone: int, *, src: int) -> torch.Tensor:
        """Where rank `src` leaves its rows in a landing zone of a rank, as bytes."""
        begin = self.capacity.landing_at(zone) + src * self.capacity.region_bytes
        return self._heap.peer(rank)[begin : begin + self.capacity.region_bytes]

    def lend(self, zone: int, nbytes: int) -> torch.Tensor:
        """The beginning of a zone of this rank, which is free again once no tensor refers to it."""
        begin = self.capacity.zone_at(zone)
        span = self._heap.span(self._rank, begin, begin + self.capacity.zone_bytes)
        self.free.remove(zone)
        weakref.finalize(span, self.free.append, zone).atexit = False
        return torch.frombuffer(span, dtype=torch.uint8, count=nbytes)

    def lend_landing(self, zone: int) -> torch.Tensor:
        """A landing zone of this rank, which is free again once no tensor refers to it."""
        begin = self.capacity.landing_at(zone)
        span = self._heap.span(self._rank, begin, begin + self.capacity.landing_bytes)
        self.free_landing.remove(zone)
        weakref.finalize(span, self.free_landing.append, zone).atexit = False
        return torch.frombuffer(span, dtype=torch.uint8)

    def zones(self) -> torch.Tensor:
        """All zones of this rank, as bytes."""
        return self._heap.peer(self._rank)[self.capacity.zones_begin :]


def _share_bytes(told: Header) -> int:
    """Room for the share of a call; in slots for any number of tokens, with ids and weights."""
    return max(told.share_bytes, told.num_slots * told.num_topk * 8)


def used_bytes(planes: Sequence[torch.Tensor], num_rows: int) -> int:
    """What `divide` cuts off a zone."""
    sizes = (num_rows * plane.shape[1] * plane.dtype.itemsize for plane in planes)
    return sum(align(nbytes, _LINE) for nbytes in sizes)


def divide(zone: torch.Tensor, planes: Sequence[torch.Tensor], num_rows: int) -> list[torch.Tensor]:
    """Cut a zone into areas of `num_rows` rows, one like each plane."""
    areas, at = [], 0
    for plane in planes:
        nbytes = num_rows * plane.shape[1] * plane.dtype.itemsize
        areas.append(zone[at : at + nbytes].view(plane.dtype).view(num_rows, plane.shape[1]))
        at += align(nbytes, _LINE)
    return areas
