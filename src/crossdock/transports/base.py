"""The seam between the exchange and what carries it: three verbs.

`route` is an all-gather of one fixed-size header and one byte string per rank; `send` starts an
all-to-all of rows whose counts every rank knows already, and `land` ends it, at once or after other
calls. A transport that does these, and ends every wait, can carry everything above. What the rows
mean is none of its business.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from crossdock.transports.header import Call, Header

__all__ = [
    "Carrier",
    "Deadline",
    "Heap",
    "Landed",
    "Landing",
    "Masks",
    "Routed",
    "Shipment",
    "Transport",
]


@dataclass(frozen=True)
class Routed:
    """What `route` brings: the header and the byte string of every rank, in rank order.

    Attributes:
        headers: of a masked rank an empty one.
        shares: of a masked rank an empty one.
        waited_us: how long this rank waited for each.
        masked: ranks that do not take part; all of them where this rank itself is masked.
        eras: how often each rank was masked so far; empty where none can be.

    Lifetime: the shares may be views of the transport's memory, valid until its next call.
    """

    headers: list[Header]
    shares: list[torch.Tensor]
    waited_us: list[int]
    masked: frozenset[int] = frozenset()
    eras: tuple[int, ...] = ()

    def lost_since(self, eras: Sequence[int], rank: int) -> frozenset[int]:
        """Ranks that were masked since an earlier call; all of them, if `rank` itself was."""
        lost = {peer for peer, era in enumerate(self.eras) if eras[peer] != era}
        return frozenset(range(len(self.eras))) if rank in lost else frozenset(lost)


@dataclass(frozen=True)
class Shipment:
    """The rows of one exchange, seen from one rank.

    Attributes:
        planes: [n, width] contiguous tensors whose rows belong together.
        sends: for each destination rank which rows it gets.
        counts: [R][R], rows from each rank to each rank. Packed, they are equal on all ranks;
            in slots a rank need only know what it sends and what it gets.
        num_slots: each rank's rows land in places of their own, so many at most; 0: the rows of
            all ranks land one behind the other.
    """

    planes: Sequence[torch.Tensor]
    sends: Sequence[torch.Tensor | slice]
    counts: Sequence[Sequence[int]]
    num_slots: int = 0

    def num_arriving(self, dst: int, *, before: int | None = None) -> int:
        """Rows for rank `dst`, from all ranks or from those before one."""
        return sum(row[dst] for row in self.counts[:before])


@dataclass(frozen=True)
class Landed:
    """The rows that have come.

    Attributes:
        planes: for each plane its rows, in pieces by ascending source rank: one piece for all
            ranks where the shipment was packed, one for each rank where it was in slots.
        waited_us: how long this rank waited for each rank.
        masked: ranks whose rows do not count, though they may have been expected.
    """

    planes: list[list[torch.Tensor]]
    waited_us: list[int]
    masked: frozenset[int] = frozenset()

    def waited_after(self, routed: Routed) -> list[int]:
        """How long this rank waited for each, in the whole call."""
        both = zip(routed.waited_us, self.waited_us, strict=True)
        return [before + after for before, after in both]

    @property
    def packed(self) -> list[torch.Tensor]:
        """The planes of a packed shipment."""
        return [pieces[0] for pieces in self.planes]


class Landing(Protocol):
    """Rows on their way to this rank."""

    def land(self, *, keep: bool) -> Landed:
        """Wait for the rows. Once, by any thread, also while other calls are made.

        Args:
            keep: the pieces are the caller's for good; otherwise they live until the next call.
                In slots they are always the caller's, who lets go of them soon.

        Raises:
            PeerTimeoutError: some ranks did not send.
            TransportError: a rank failed.
        """
        ...


class Masks(Protocol):
    """Which ranks a transport goes on without."""

    def mask(self, rank: int) -> None:
        """From the next call on, go on without a rank."""
        ...

    def unmask(self, rank: int) -> None:
        """From the next call on, count on a rank again; on that rank itself: come back."""
        ...

    def masked(self) -> frozenset[int]:
        """The ranks without which the last call went on, and those masked since."""
        ...

    def catch_up(self, call: Call) -> int:
        """The number that a call has among the others.

        It is the call's own, unless this rank comes back after they went on without it: then they
        tell, and this waits for them.

        Raises:
            PeerTimeoutError: none of them came with a call that counts on this rank.
        """
        ...


class Carrier(Protocol):
    """What a session needs of whatever moves rows between the ranks of one group.

    Attributes:
        name: as `select` knows it.
        device_types: kinds of device whose rows it moves; empty for any.
        masks: the masks, where it can do without ranks.
        stream: where asynchronous calls run; None where that is the current stream or the host.
    """

    name: str
    device_types: tuple[str, ...]
    masks: Masks | None
    stream: torch.cuda.Stream | None

    def refuse(self, call: Call, header: Header, reason: str) -> None:
        """Tell the peers, in place of `route`, that this rank will not take part, and why."""
        ...

    def fail(self, call: Call, error: BaseException) -> None:
        """Tell the peers at once that this rank gave up in the middle of a call."""
        ...

    def memory(self) -> Mapping[str, int]:
        """Bytes this rank holds, by purpose."""
        ...

    def local_memory(self) -> torch.Tensor | None:
        """The memory rows land in, as uint8; None when the transport owns none."""
        ...

    def close(self) -> None:
        """Give everything back. Local and idempotent."""
        ...


class Transport(Carrier, Protocol):
    """Carries an exchange between the ranks of one group, on the host's orders.

    `route` and `send` are collective: every rank calls them in the same order, also with nothing
    to send. What all ranks learn together (`RankMismatchError`, `PeerRefusedError`,
    `BufferTooSmallError`) leaves the transport usable; after any other error it is not.
    """

    def route(self, call: Call, header: Header, share: torch.Tensor) -> Routed:
        """Tell every rank the header and the share, and learn theirs.

        Args:
            call: the call this opens.
            header: this rank's, with `share_bytes` equal to the length of `share`.
            share: uint8, any length.

        Raises:
            RankMismatchError: the ranks are not making the same call.
            BufferTooSmallError: some rank needs more memory than its limit allows.
            PeerTimeoutError: some ranks did not come.
            PeerRefusedError: a rank would not take part.
            TransportError: a rank failed.
        """
        ...

    def send(self, call: Call, shipment: Shipment) -> Landing:
        """Send rows to every rank, without waiting for theirs.

        Args:
            call: the call that `route` opened.
            shipment: the rows of this rank, and how many go between all ranks.

        Raises:
            TransportError: a rank failed.
        """
        ...


class Heap(Protocol):
    """Memory of every rank that every rank can address."""

    nbytes: int

    def peer(self, rank: int) -> torch.Tensor:
        """The memory of `rank` as uint8 [nbytes]; `peer(own rank)` is the local one."""
        ...

    def words(self, rank: int) -> memoryview:
        """The same memory as 64-bit integers. Aligned loads and stores of one are atomic."""
        ...

    def span(self, rank: int, begin: int, end: int) -> memoryview:
        """Some bytes of it, as an object of its own, whose end can be watched."""
        ...


class Deadline:
    """When a wait must end."""

    def __init__(self, timeout_s: float) -> None:
        self._begin = time.monotonic()
        self._timeout_s = timeout_s

    @property
    def waited_s(self) -> float:
        """Seconds since the wait began."""
        return time.monotonic() - self._begin

    @property
    def waited_us(self) -> int:
        """The same in whole microseconds."""
        return int(self.waited_s * 1e6)

    @property
    def passed(self) -> bool:
        """Whether the wait must end now."""
        return bool(self._timeout_s) and self.waited_s > self._timeout_s

    @property
    def remaining_s(self) -> float | None:
        """Seconds left, at least 0; None without a limit."""
        return max(self._timeout_s - self.waited_s, 0.0) if self._timeout_s else None
