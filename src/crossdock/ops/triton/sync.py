"""How programs of different GPUs tell each other where they stand, in Triton.

Two ways, both in words with a single writer that hold the number of a round and only grow, so that
nothing is ever cleaned. A *flag* is a 32-bit word written with release at system scope after the
rows it covers, and polled with acquire. A *tagged* word carries 32 bits of data beside the number:
a plain 64-bit store, polled until the number is right, without a fence, for what is in a hurry.

Rounds are counted in device memory. A program draws a *ticket*, which tells it the round and its
role; who draws the last one of a round opens the next. That nothing is still running from the round
before follows from the order of launches, so nobody counts finished programs.

Every wait ends. A rank that is late past the deadline is written to the report, and then either it
is masked or the whole buffer has failed: later waits end at once, and the host raises.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

__all__ = [
    "Address",
    "Group",
    "Link",
    "condemn",
    "draw_ticket",
    "enter",
    "heap_of",
    "heaps_of",
    "is_counted_on",
    "is_masked",
    "mask_ranks",
    "post_credit",
    "post_rounds",
    "raise_flags",
    "read_flags",
    "read_tagged",
    "row_at",
    "tagged",
    "time_flags",
    "time_tagged",
    "wait_flags",
    "wait_for_credit",
    "wait_here",
    "wait_tagged",
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
    """

    size: int
    padded: int
    num_states: int
    is_compiled: bool
    can_shrink: bool = False


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
        states: [num_states] int64, `(rounds completed << 32) | tickets drawn` of each operation.
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


@triton.jit
def draw_ticket(link, num_tickets):
    """Which program of the round this is, and the number of the round.

    Example: state (rounds completed, tickets drawn) = (4, 2), 3 tickets -> ticket 2 of round 5,
        state (5, 0)
    """
    state = words_at(link.states, 8) + link.kind
    before = tl.atomic_add(state, 1, sem="relaxed", scope="gpu")
    ticket = (before & 0xFFFFFFFF).to(tl.int32)
    if ticket == num_tickets - 1:
        tl.atomic_add(state, (1 << 32) - tl.cast(num_tickets, tl.int64), sem="relaxed", scope="gpu")
    return ticket, (before >> 32).to(tl.int32) + 1


@triton.jit
def tagged(value, number):
    """A word of 32 bits of data and the number of the round."""
    return (value.to(tl.int64) << 32) | number.to(tl.int64)


@triton.jit
def _now(polls, G: tl.constexpr):
    if G.is_compiled:
        return globaltimer()
    else:
        return polls


@triton.jit
def _look(words, wanted, TAGGED: tl.constexpr):
    if TAGGED:
        return tl.load(words, mask=wanted, other=0, volatile=True)
    else:
        seen = tl.atomic_add(words, 0, mask=wanted, sem="acquire", scope="sys")
        return tl.where(wanted, seen, 0)


@triton.jit
def _is_late(seen, number, TAGGED: tl.constexpr, SHIFT: tl.constexpr):
    if TAGGED:
        return seen.to(tl.int32) != number
    else:
        return (seen >> SHIFT) < number


@triton.jit
def _wait(
    words,
    wanted,
    ranks,
    number,
    link,
    phase,
    G: tl.constexpr,
    TAGGED: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """What the words hold once all wanted ones have come, 0 where one has not; and how long."""
    if G.can_shrink:
        wanted = wanted & is_counted_on(link, ranks)
    seen = _look(words, wanted, TAGGED)
    spent = tl.cast(0, tl.int64)
    late = wanted & _is_late(seen, number, TAGGED, SHIFT)
    if tl.max(late.to(tl.int32)) > 0:
        watch = words_at(heap_of(link, link.rank), 8)
        failed = tl.load(watch + FAILED, volatile=True)
        polls = failed * 0
        begin = _now(polls, G)
        TICK: tl.constexpr = 1000 if G.is_compiled else 1
        waiting = failed == 0
        while waiting:
            polls += 1
            seen = _look(words, wanted, TAGGED)
            late = wanted & _is_late(seen, number, TAGGED, SHIFT)
            if G.can_shrink:
                late = late & is_counted_on(link, ranks)
            failed = tl.load(watch + FAILED, volatile=True)
            over = (link.deadline > 0) & (
                _now(polls, G) - begin > tl.cast(link.deadline, tl.int64) * TICK
            )
            if G.can_shrink:
                over = over & _may_go_on(late, ranks, _now(polls, G) - begin, link, watch, G)
            waiting = (tl.max(late.to(tl.int32)) > 0) & (failed == 0) & (over == 0)
        if (tl.max(late.to(tl.int32)) > 0) & (failed == 0):
            _give_up(late, ranks, number, link, watch, phase, G)
        failed = tl.load(watch + FAILED, volatile=True)
        if failed != 0:
            tl.store(words_at(tl.load(watch + REPORT), 8) + G.size, failed)
        seen = tl.where(wanted & _is_late(seen, number, TAGGED, SHIFT), 0, seen)
        spent = ((_now(polls, G) - begin) // TICK).to(tl.int64)
    tl.debug_barrier()
    return seen, spent


@triton.jit
def _give_up(late, ranks, number, link, watch, phase, G: tl.constexpr):
    """Write down who is missing, and either mask them or let every later wait end at once."""
    fails = tl.cast(1, tl.int1)
    if G.can_shrink:
        fails = _is_enough(late, ranks, watch, G) == 0
    if fails:
        word = (number.to(tl.int64) << 32) | (link.kind * 256 + phase)
        report = words_at(tl.load(watch + REPORT), 8)
        tl.store(report + ranks, word + ranks.to(tl.int64) * 0, mask=late)
        tl.store(watch + FAILED, 1)
    elif G.can_shrink:
        _mask_everywhere(_named(late, ranks, G), link, G)


@triton.jit
def condemn(src, number, link, phase, G: tl.constexpr):
    """Write down that something is wrong with a rank; every later wait, of all, ends at once."""
    peer = tl.arange(0, G.padded)
    report = words_at(tl.load(words_at(heap_of(link, link.rank), 8) + REPORT), 8)
    tl.store(report + src, (number.to(tl.int64) << 32) | (link.kind * 256 + phase))
    tl.store(report + G.size, 1)
    base = heaps_of(link, peer, peer < G.size)
    why = peer.to(tl.int64) * 0 + GAVE_UP + link.rank
    tl.store(words_at(base, 8) + FAILED, why, mask=peer < G.size)


@triton.jit
def is_counted_on(link, ranks):
    """Whether ranks take part, seen from here: none does where the others go on without this."""
    masked = words_at(heap_of(link, link.rank), 8) + MASKED
    alone = tl.load(masked + link.rank, volatile=True)
    return (tl.load(masked + ranks, volatile=True) == 0) & (alone == 0)


@triton.jit
def mask_ranks(these, link, G: tl.constexpr):
    """From now on this rank goes on without ranks, bool [R padded].

    The others may still be in the call before, to which these belong: they hear of it in this one.
    """
    peer = tl.arange(0, G.padded)
    words = words_at(heap_of(link, link.rank), 8) + MASKED + peer
    tl.store(words, peer.to(tl.int64) * 0 + 1, mask=these & (peer < G.size))


@triton.jit
def _mask_everywhere(these, link, G: tl.constexpr):
    """All go on without ranks, bool [R padded], who hear of it themselves: they are late."""
    peer = tl.arange(0, G.padded)
    watch = words_at(heaps_of(link, peer, peer < G.size), 8)
    words = watch[:, None] + MASKED + peer[None, :]
    wanted = (peer[:, None] < G.size) & these[None, :]
    tl.store(words, peer[:, None] * 0 + peer[None, :].to(tl.int64) * 0 + 1, mask=wanted)


@triton.jit
def _named(late, ranks, G: tl.constexpr):
    """Which ranks are among those of words, of any shape, that are late: bool [R padded]."""
    peer = tl.arange(0, G.padded)
    late, ranks = tl.ravel(late), tl.ravel(ranks + late.to(tl.int32) * 0)
    return tl.max((late[None, :] & (ranks[None, :] == peer[:, None])).to(tl.int32), 1) > 0


@triton.jit
def _is_enough(late, ranks, watch, G: tl.constexpr):
    """Whether at least half of the ranks that were left remain without those that are late."""
    peer = tl.arange(0, G.padded)
    masked = tl.load(watch + MASKED + peer, mask=peer < G.size, other=1, volatile=True) != 0
    left = tl.sum((masked == 0).to(tl.int32))
    gone = tl.sum((_named(late, ranks, G) & (masked == 0)).to(tl.int32))
    return 2 * (left - gone) >= left


@triton.jit
def _may_go_on(late, ranks, spent, link, watch, G: tl.constexpr):
    """After the deadline: a few that are early wait for the many, but not for ever."""
    TICK: tl.constexpr = 1000 if G.is_compiled else 1
    last = spent > tl.cast(link.deadline, tl.int64) * (TICK * G.size)
    return _is_enough(late, ranks, watch, G) | last


@triton.jit
def wait_tagged(words, wanted, ranks, number, link, phase, G: tl.constexpr):
    """The data of tagged words of this round, each written by the rank beside it.

    Args:
        words: pointers to 64-bit words, any shape.
        wanted: bool, which to wait for.
        ranks: int32, who writes each.
        number: of the round.
        link: see `Link`.
        phase: what this wait is, for the report.
        G: see `Group`.

    Returns:
        int32, 0 where nothing was wanted or a rank did not come.
    """
    data, _ = time_tagged(words, wanted, ranks, number, link, phase, G)
    return data


@triton.jit
def time_tagged(words, wanted, ranks, number, link, phase, G: tl.constexpr):
    """The same, and how long it took: see `time_flags`."""
    seen, spent = _wait(words, wanted, ranks, number, link, phase, G, True, 0)
    return (seen >> 32).to(tl.int32), spent


@triton.jit
def wait_flags(words, wanted, ranks, number, link, phase, G: tl.constexpr, SHIFT: tl.constexpr):
    """The same for flags that hold a number, shifted left by `SHIFT` bits of data, or more.

    Rows that a flag covers may be read after it.
    """
    seen, _ = _wait(words, wanted, ranks, number, link, phase, G, False, SHIFT)
    return seen


@triton.jit
def time_flags(words, wanted, ranks, number, link, phase, G: tl.constexpr, SHIFT: tl.constexpr):
    """How long flags were waited for, in microseconds (int64); in the interpreter in polls."""
    _, spent = _wait(words, wanted, ranks, number, link, phase, G, False, SHIFT)
    return spent


@triton.jit
def read_tagged(words, wanted):
    """The data of tagged words that have come."""
    return (_look(words, wanted, True) >> 32).to(tl.int32)


@triton.jit
def read_flags(words, wanted):
    """Flags that have been raised, and the rows that they cover may be read after it."""
    seen = _look(words, wanted, False)
    tl.debug_barrier()
    return seen


@triton.jit
def is_masked(link, ranks):
    """Whether this rank goes on without ranks, or they without it where it is meant itself."""
    masked = words_at(heap_of(link, link.rank), 8) + MASKED
    return tl.load(masked + ranks, volatile=True) != 0


@triton.jit
def wait_here(word, number, link, G: tl.constexpr):
    """The data of a tagged word that another program of this kernel writes; 0 if it cannot."""
    watch = words_at(heap_of(link, link.rank), 8)
    seen = tl.load(word, volatile=True)
    failed = tl.load(watch + FAILED, volatile=True)
    while (seen.to(tl.int32) != number) & (failed == 0):
        seen = tl.load(word, volatile=True)
        failed = tl.load(watch + FAILED, volatile=True)
    return tl.where(seen.to(tl.int32) == number, (seen >> 32).to(tl.int32), 0)


@triton.jit
def raise_flags(words, wanted, value):
    """Write flags after all that this program has written."""
    tl.debug_barrier()
    tl.atomic_xchg(words, value, mask=wanted, sem="release", scope="sys")


@triton.jit
def post_rounds(link, number, NUM: tl.constexpr, G: tl.constexpr):
    """Tell every peer how many rounds of the first `NUM` operations this rank has behind it.

    A kernel begins when those launched before it are over, so what they read may be overwritten.
    Its own round is not behind it, though all its tickets may have been drawn.
    """
    peer = tl.arange(0, G.padded)
    state = tl.arange(0, NUM)
    behind = (tl.load(words_at(link.states, 8) + state) >> 32).to(tl.int32)
    behind = tl.where(state == link.kind, number - 1, behind)
    base = heaps_of(link, peer, peer < G.size)
    mine = words_at(base + link.credits + link.rank * (4 * G.num_states), 4)
    words = mine[:, None] + state[None, :]
    wanted = (peer[:, None] < G.size) & (state[None, :] >= 0)
    value = behind[None, :] + peer[:, None] * 0
    tl.atomic_xchg(words, value, mask=wanted, sem="release", scope="sys")


@triton.jit
def post_credit(link, kind, rounds, G: tl.constexpr):
    """Tell every peer how many rounds of one operation this rank has behind it."""
    peer = tl.arange(0, G.padded)
    base = heaps_of(link, peer, peer < G.size)
    words = words_at(base + link.credits + 4 * (link.rank * G.num_states + kind), 4)
    tl.atomic_xchg(words, peer * 0 + rounds, mask=peer < G.size, sem="release", scope="sys")


@triton.jit
def enter(link, number, G: tl.constexpr):
    """Tell every peer that this rank has come to a round: who has not is missing in it."""
    peer = tl.arange(0, G.padded)
    base = heaps_of(link, peer, peer < G.size)
    word = G.size * G.num_states + link.rank * G.num_states + link.kind
    tl.store(words_at(base + link.credits, 4) + word, peer * 0 + number, mask=peer < G.size)


@triton.jit
def wait_for_credit(own, kind, number, link, phase, G: tl.constexpr):
    """Wait until every rank has the round before this one behind it, so that it reads no more.

    Returns whether all have: where a wait failed, nobody may write to what they read.
    """
    rank = tl.arange(0, G.padded)
    words = words_at(own + link.credits, 4) + rank * G.num_states + kind
    seen = wait_flags(words, rank < G.size, rank, number - 1, link, phase, G, 0)
    return tl.min(tl.where(rank < G.size, seen, number)) >= number - 1
