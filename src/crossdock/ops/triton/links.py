"""What kernels need to reach other ranks: where heaps are, and pointers to what is in them."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

__all__ = [
    "FAILED",
    "GAVE_UP",
    "MASKED",
    "REPORT",
    "Address",
    "Group",
    "Link",
    "alike",
    "heap_of",
    "heaps_of",
    "look_alike",
    "row_at",
    "words_at",
]

Address = int
"""An address, or an offset in a heap: 64 bits. Whatever else kernels are told has 32."""

FAILED = tl.constexpr(0)
GAVE_UP = tl.constexpr(2)
"""What stands there if another rank gave up, plus that rank; 1 if this one waited in vain."""
REPORT = tl.constexpr(1)
MASKED = tl.constexpr(8)


class Group(NamedTuple):
    """The ranks, as constants of a kernel.

    Attributes:
        size: R.
        padded: the next power of two.
        num_states: rounds that are counted, a power of two.
        is_compiled: False in the interpreter, which has no clock and cuts bf16 off.
        can_shrink: whether the others go on without a rank that is late.
        overlaps: whether programs may come before the kernel before is over. See `sync.follow`.
        looks: looks at what is waited for after which it is asked what else may end a wait.
    """

    size: int
    padded: int
    num_states: int
    is_compiled: bool
    can_shrink: bool = False
    overlaps: bool = False
    looks: int = 1


class Link(NamedTuple):
    """What a kernel needs to reach the other ranks.

    Whatever kernels take, here and elsewhere, are numbers: addresses of tensors, offsets in the
    heap and counts. So a launch need not look at tensors, and what an address is aligned to is
    said where it is used.

    Attributes:
        peers: [R] int64, the address of every rank's heap. That begins with the words that say how
            this rank fares: failed, address of the report ([R] int64: what each rank was missing
            in; then why this rank failed), and from the eighth on one for each rank that says
            whether it is masked.
        states: [num_states + 2] int64, `(rounds completed << 32) | tickets drawn` of each
            operation; then see `signals.post_rounds`.
        credits: offset in the heap of [R, num_states] int32, the rounds each rank has behind it.
            Behind that as many words: the last round of each operation that it has come to.
        rank: this rank.
        kind: which of the states is that of this operation.
        deadline: microseconds that a wait may last; in the interpreter, which has no clock, polls.
            0: for ever.
    """

    peers: Address
    states: Address
    credits: Address
    rank: int
    kind: int
    deadline: int


@triton.jit
def words_at(address, BYTES: tl.constexpr):
    """Pointers to words of so many bytes; 16 means 8-byte words that begin on 16-byte bounds.

    The alignment is told of the pointer: told of the number it would be lost.
    """
    address = tl.cast(address, tl.int64)
    if BYTES == 16:
        return tl.multiple_of(address.to(tl.pointer_type(tl.int64), bitcast=True), 16)
    elif BYTES == 8:
        return address.to(tl.pointer_type(tl.int64), bitcast=True)
    elif BYTES == 4:
        return address.to(tl.pointer_type(tl.int32), bitcast=True)
    elif BYTES == 2:
        return address.to(tl.pointer_type(tl.int16), bitcast=True)
    else:
        return address.to(tl.pointer_type(tl.uint8), bitcast=True)


@triton.jit
def row_at(address, ELEMENT: tl.constexpr):
    """Pointer to the elements of a row that begins on a 16-byte bound."""
    pointer = tl.cast(address, tl.int64).to(tl.pointer_type(ELEMENT), bitcast=True)
    return tl.multiple_of(pointer, 16)


@triton.jit
def heap_of(link, rank):
    """The address of a rank's heap."""
    return tl.load(words_at(link.peers, 8) + rank)


@triton.jit
def heaps_of(link, ranks, wanted):
    """The addresses of the heaps of ranks."""
    return tl.load(words_at(link.peers, 8) + ranks, mask=wanted, other=0)


THREADS = tl.constexpr(1024)
"""The most that a program has."""


@triton.jit
def alike(value):
    """The largest of what the warps of a program have for a number: the same for all of them.

    Each warp loads for itself, so of a word that changes meanwhile they may see different values.
    No branch may depend on those: where only some warps come to a barrier, it is none. (In the
    interpreter there is but one, which need not be asked.)
    """
    return tl.max(tl.zeros([THREADS], tl.int32) + value)


@triton.jit
def look_alike(word):
    """One word that others may write to, the same for all warps: one thread loads it."""
    return tl.atomic_add(word, 0, sem="relaxed", scope="sys")
