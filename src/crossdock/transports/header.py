"""What a call is, what every rank says when it enters one, and whether they agree.

T tokens here, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from enum import IntEnum
from types import MappingProxyType
from typing import NamedTuple

from crossdock.errors import BufferTooSmallError, PeerRefusedError, RankMismatchError
from crossdock.formats import describe_code

__all__ = ["HEADER_WORDS", "Call", "Header", "Operation", "check_agreement"]


class Operation(IntEnum):
    """What a rank is doing."""

    NONE = 0
    DISPATCH = 1
    CACHED_DISPATCH = 2
    COMBINE = 3
    WARMUP = 4
    LOW_LATENCY_DISPATCH = 5
    LOW_LATENCY_COMBINE = 6

    @property
    def can_shrink(self) -> bool:
        """Whether the call goes on without ranks that are masked."""
        return self in {Operation.LOW_LATENCY_DISPATCH, Operation.LOW_LATENCY_COMBINE}

    def __str__(self) -> str:
        return self.name.lower().replace("_", " ")


class Call(NamedTuple):
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
        num_slots: places that a rank has for the rows of each other one; 0 when rows are packed.
        hidden, format_code: what a row is; see `formats`.
        num_topk, num_experts, flags: what the routing is; `flags` tells its optional parts.
        checksum: tells which dispatch the handle is of; 0 says nothing.
        row_bytes: bytes of a row in this call.
        return_bytes: bytes of a row in the combine that will follow; reserved now.
        reserve_tokens: tokens a rank to make room for.
        share_bytes: length of the byte string that travels beside the header.
        zone: where this rank wants its rows; set by the transport.
        needed_bytes, have_bytes: of a refusal for want of memory.
        masked: the ranks that this rank goes on without, a bit each; set by the transport.
        entered_us: when this rank came, by its clock; set by transports that measure with it.
    """

    operation: int = 0
    sequence: int = 0
    refused: int = 0
    num_tokens: int = 0
    num_rows: int = 0
    num_slots: int = 0
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
    masked: int = 0
    entered_us: int = 0

    def __str__(self) -> str:
        if not self.sequence:
            return "nothing yet"
        return f"in {Operation(self.operation)} {self.sequence} with {self.num_tokens} tokens"


HEADER_WORDS = len(Header._fields)

_AGREED = (
    ("operation", "operation"),
    ("sequence", "number of the call"),
    ("num_slots", "num_max_dispatch_tokens_per_rank"),
    ("hidden", "hidden size"),
    ("format_code", "dtype of the rows"),
    ("num_topk", "top-k"),
    ("num_experts", "num_experts"),
    ("flags", "presence of topk_idx and topk_weights, here or in the dispatch of the handle"),
    ("checksum", "handle"),
)


_SHOWN = MappingProxyType({"operation": Operation, "format_code": describe_code})


def check_agreement(
    headers: Sequence[Header],
    call: Call,
    *,
    reason_of: Callable[[int], str],
    masked: Collection[int] = (),
) -> None:
    """Raise unless all ranks are making the same call. Every rank comes to the same verdict.

    Args:
        headers: of all ranks, in rank order.
        call: the call this rank makes.
        reason_of: the reason that a refusing rank gave.
        masked: ranks that nobody asks.

    Raises:
        BufferTooSmallError: a rank refused because of its limit on memory.
        PeerRefusedError: a rank refused for another reason.
        RankMismatchError: they differ in operation, shapes, dtype or handle.
    """
    asked = {rank: header for rank, header in enumerate(headers) if rank not in masked}
    for rank, header in asked.items():
        if header.refused and header.have_bytes:
            raise BufferTooSmallError(
                header.needed_bytes, header.have_bytes, argument="max_buffer_bytes", rank=rank
            )
        if header.refused:
            raise PeerRefusedError(rank, operation=str(call), reason=reason_of(rank))
    for field, name in _AGREED:
        values = {rank: getattr(header, field) for rank, header in asked.items()}
        if field == "checksum":
            values = {rank: value for rank, value in values.items() if value}
        if len(set(values.values())) > 1:
            show = _SHOWN.get(field, int)
            told = {rank: str(show(value)) for rank, value in values.items()}
            raise RankMismatchError(name, told, where=f"call {call.sequence}")
