"""The seam between the exchange and what carries it: two verbs.

`route` is an all-gather of one fixed-size header and one byte string per rank; `move` is an
all-to-all of rows whose counts every rank knows already. A transport that does these two, and
ends every wait, can carry everything above. What the rows mean is none of its business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch

from crossdock.errors import BufferTooSmallError, PeerRefusedError, RankMismatchError
from crossdock.formats import describe_code

__all__ = [
    "HEADER_WORDS",
    "Call",
    "Deadline",
    "Header",
    "Heap",
    "Operation",
    "Routed",
    "Shipment",
    "Transport",
    "check_agreement",
]


class Operation(IntEnum):
    """What a rank is doing."""

    NONE = 0
    DISPATCH = 1
    CACHED_DISPATCH = 2
    COMBINE = 3
    WARMUP = 4

    def __str__(self) -> str:
        return self.name.lower().replace("_", " ")


@dataclass(frozen=True)
class Call:
    """One collective call of a buffer.

    Attributes:
        operation: what is done.
        sequence: number of the call in its buffer, from 1; the same on all ranks.
        timeout_s: how long a wait in this call may last; 0 for ever.
    """

    operation: Operation
    sequence: int
    timeout_s: float

    def __str__(self) -> str:
        return f"{self.operation} {self.sequence}"


class Header(NamedTuple):
    """What every rank tells every other first, in every call. All fields are 64-bit integers.

    Attributes:
        operation, sequence: what call this is.
        refused: 1 when the rank will not take part; its reason travels beside the header.
        num_tokens: T, tokens of this rank.
        num_rows: rows this rank keeps (dispatch) or brings (combine).
        hidden, format_code: what a row is; see `formats`.
        num_topk, num_experts, flags: what the routing is; `flags` tells its optional parts.
        checksum: of the handle's rank_prefix_matrix; 0 in a first call.
        row_bytes: bytes of a row in this call.
        return_bytes: bytes of a row in the combine that will follow; reserved now.
        reserve_tokens: tokens a rank to make room for.
        share_bytes: length of the byte string that travels beside the header.
        zone: where this rank wants its rows; set by the transport.
        needed_bytes, have_bytes: of a refusal for want of memory.
    """

    operation: int = 0
    sequence: int = 0
    refused: int = 0
    num_tokens: int = 0
    num_rows: int = 0
    hidden: int = 0
    format_code: int = 0
    num_topk: int = 0
    num_experts: int = 0
    flags: int = 0
    checksum: int = 0
    row_bytes: int = 0
    return_bytes: int = 0
    reserve_tokens: int = 0
    share_bytes: int = 0
    zone: int = 0
    needed_bytes: int = 0
    have_bytes: int = 0

    def __str__(self) -> str:
        if not self.sequence:
            return "nothing yet"
        return f"in {Operation(self.operation)} {self.sequence} with {self.num_tokens} tokens"


HEADER_WORDS = len(Header._fields)

_AGREED = (
    ("operation", "operation"),
    ("sequence", "number of the call"),
    ("hidden", "hidden size"),
    ("format_code", "dtype of the rows"),
    ("num_topk", "top-k"),
    ("num_experts", "num_experts"),
    ("flags", "presence of topk_idx and topk_weights"),
    ("checksum", "handle"),
)


_SHOWN = MappingProxyType({"operation": Operation, "format_code": describe_code})


def check_agreement(
    headers: Sequence[Header], call: Call, *, reason_of: Callable[[int], str]
) -> None:
    """Raise unless all ranks are making the same call. Every rank comes to the same verdict.

    Args:
        headers: of all ranks, in rank order.
        call: the call this rank makes.
        reason_of: the reason that a refusing rank gave.

    Raises:
        BufferTooSmallError: a rank refused because of its limit on memory.
        PeerRefusedError: a rank refused for another reason.
        RankMismatchError: they differ in operation, shapes, dtype or handle.
    """
    for rank, header in enumerate(headers):
        if header.refused and header.have_bytes:
            raise BufferTooSmallError(
                header.needed_bytes, header.have_bytes, argument="max_buffer_bytes", rank=rank
            )
        if header.refused:
            raise PeerRefusedError(rank, operation=str(call), reason=reason_of(rank))
    for field, name in _AGREED:
        values = {rank: getattr(header, field) for rank, header in enumerate(headers)}
        if len(set(values.values())) > 1:
            show = _SHOWN.get(field, int)
            told = {rank: str(show(value)) for rank, value in values.items()}
            raise RankMismatchError(name, told, where=f"call {call.sequence}")


@dataclass(frozen=True)
class Routed:
    """What `route` brings: the header and the byte string of every rank, in rank order.

    Lifetime: the shares may be views of the transport's memory, valid until its next call.
    """

    headers: list[Header]
    shares: list[torch.Tensor]


@dataclass(frozen=True)
class Shipment:
    """The rows of one exchange, seen from one rank.

    Attributes:
        planes: [n, width] contiguous tensors whose rows belong together.
        sends: for each destination rank which rows it gets.
        counts: [R][R], rows from each rank to each rank; equal on all ranks.
    """

    planes: Sequence[torch.Tensor]
    sends: Sequence[torch.Tensor | slice]
    counts: Sequence[Sequence[int]]

    def num_arriving(self, dst: int, *, before: int | None = None) -> int:
        """Rows for rank `dst`, from all ranks or from those before one."""
        return sum(row[dst] for row in self.counts[:before])


class Transport(Protocol):
    """Carries an exchange between the ranks of one group.

    The two verbs are collective: every rank calls them in the same order, also with nothing to
    send. What all ranks learn together (`RankMismatchError`, `PeerRefusedError`,
    `BufferTooSmallError`) leaves the transport usable; after any other error it is not.

    Attributes:
        name: as `select` knows it.
        device_types: kinds of device whose rows it moves; empty for any.
    """

    name: str
    device_types: tuple[str, ...]

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

    def move(self, call: Call, shipment: Shipment, *, keep: bool) -> list[torch.Tensor]:
        """Send rows to every rank and return what came, by source rank.

        Args:
            call: the call that `route` opened.
            shipment: the rows of this rank, and how many go between all ranks.
            keep: the result is the caller's for good; otherwise it lives until the next call.

        Returns:
            One [rows for this rank, width] tensor per plane.

        Raises:
            PeerTimeoutError: some ranks did not send.
            TransportError: a rank failed.
        """
        ...

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
    def passed(self) -> bool:
        """Whether the wait must end now."""
        return bool(self._timeout_s) and self.waited_s > self._timeout_s

    @property
    def remaining_s(self) -> float | None:
        """Seconds left, at least 0; None without a limit."""
        return max(self._timeout_s - self.waited_s, 0.0) if self._timeout_s else None
