"""How programs of different GPUs tell each other where they stand, in Triton.

Two ways, both in words with a single writer that hold the number of a round, so that nothing is
ever cleaned. A *flag* is a 32-bit word written with release at system scope after the rows it
covers, and polled with acquire. A *tagged* word carries 32 bits of data beside the number: a plain
64-bit store, polled until the number is right, without a fence, for what is in a hurry.

Rounds are counted in device memory, and begin again behind the largest number of 32 bits. A program
draws a *ticket*, which tells it the round and its role; who draws the last one of a round opens the
next. That nothing is still running from the round before follows from the order of launches, so
nobody counts finished programs.

Every wait ends. A rank that is late past the deadline is written to the report, and then either it
is masked or the whole buffer has failed: later waits end at once, and the host raises.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, globaltimer

from crossdock.ops.triton.links import (
    FAILED,
    GAVE_UP,
    REPORT,
    alike,
    heap_of,
    heaps_of,
    look_alike,
    words_at,
)
from crossdock.ops.triton.masked import (
    is_counted_on,
    is_enough,
    is_left_out,
    mask_everywhere,
    may_go_on,
    named,
)

__all__ = [
    "condemn",
    "draw_ticket",
    "follow",
    "has_credit",
    "look_for_credit",
    "read_flags",
    "read_tagged",
    "time_flags",
    "time_tagged",
    "wait_flags",
    "wait_for_credit",
    "wait_here",
    "wait_singled",
    "wait_tagged",
]

CREDIT, TAGGED, SINGLED, FLAG = (tl.constexpr(n) for n in range(4))
"""What is waited for: a number of this round, or of a later one, which their difference tells; a
tagged word of this round; the same, where few programs look; a flag of this round. Of the last two
all warps see the same."""

COME, GONE, LATE, OVER, BROKEN = (tl.constexpr(n) for n in range(5))
"""How a wait stands: all is there; all of those that are still counted on; some are late; some are,
and the deadline has passed; some are, and the buffer has failed."""


@triton.jit
def follow(G: tl.constexpr):
    """Wait until the kernel before is over; the programs of the next one may come, and wait.

    For kernels that are launched as `Kernel` launches those that overlap.
    """
    if G.overlaps:
        gdc_wait()
        gdc_launch_dependents()


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
def _now(polls, G: tl.constexpr):
    if G.is_compiled:
        return globaltimer()
    else:
        return polls


@triton.jit
def _look(words, wanted, HOW: tl.constexpr):
    """What words hold, 0 for those that are not wanted.

    One thread loads for all, which takes longer where many programs do so, or every thread does.
    """
    if HOW == FLAG:
        seen = tl.atomic_add(words, 0, mask=wanted, sem="acquire", scope="sys")
        return tl.where(wanted, seen, 0)
    elif HOW == SINGLED:
        seen = tl.atomic_add(words, 0, mask=wanted, sem="relaxed", scope="sys")
        return tl.where(wanted, seen, 0)
    else:
        return tl.load(words, mask=wanted, other=0, volatile=True)


@triton.jit
def _is_late(seen, number, HOW: tl.constexpr, SHIFT: tl.constexpr, G: tl.constexpr):
    """Whether words are of another round; of an earlier one, where a rank may be left behind."""
    if HOW == CREDIT:
        return number - seen > 0
    elif HOW != FLAG:
        return seen.to(tl.int32) != number
    elif G.can_shrink:
        return (number << SHIFT) - ((seen >> SHIFT) << SHIFT) > 0
    else:
        return ((seen ^ (number << SHIFT)) >> SHIFT) != 0


@triton.jit
def _standing(late, ranks, begin, polls, link, watch, G: tl.constexpr, HOW: tl.constexpr):
    """How a wait stands, in which the words of some ranks may be late; the same for all warps.

    Where the words look the same to all of them, what else may end it is asked now and then only.
    """
    EVERY: tl.constexpr = G.looks if HOW >= SINGLED else 1
    standing = tl.max(late.to(tl.int32)) * LATE
    if polls % EVERY == 0:
        standing = _judged(late, ranks, begin, polls, link, watch, G)
    return standing


@triton.jit
def _judged(late, ranks, begin, polls, link, watch, G: tl.constexpr):
    """The same, with the deadline and failures in mind."""
    TICK: tl.constexpr = 1000 if G.is_compiled else 1
    spent = (globaltimer() if G.is_compiled else polls) - begin
    over = (link.deadline > 0) & (spent > tl.cast(link.deadline, tl.int64) * TICK)
    if G.can_shrink:
        is_missed = late & is_counted_on(link, ranks, G)
        over = over & may_go_on(is_missed, ranks, spent, link, watch, G)
        standing = tl.maximum(
            tl.max(late.to(tl.int32)) * GONE, tl.max(is_missed.to(tl.int32)) * LATE
        )
    else:
        standing = tl.max(late.to(tl.int32)) * LATE
    ended = tl.where(tl.load(watch + FAILED, volatile=True) != 0, BROKEN, over.to(tl.int32) * OVER)
    standing = tl.where(standing == LATE, tl.maximum(standing, ended), standing)
    return alike(standing) if G.is_compiled else standing


@triton.jit
def _wait(
    seen,
    words,
    wanted,
    ranks,
    number,
    link,
    phase,
    G: tl.constexpr,
    HOW: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """What the words hold once all wanted ones have come, whether they have, and how long it took.

    Those of ranks that are gone on without hold 0, and are not missed. `seen` is what the words
    held at first.
    """
    if G.can_shrink:
        wanted = wanted & is_counted_on(link, ranks, G)
        seen = tl.where(wanted, seen, 0)
    spent = tl.cast(0, tl.int64)
    late = wanted & _is_late(seen, number, HOW, SHIFT, G)
    standing = tl.max(late.to(tl.int32)) * LATE
    if HOW < SINGLED:
        standing = alike(standing) if G.is_compiled else standing
    if standing == LATE:
        watch = words_at(heap_of(link, link.rank), 8)
        polls = number * 0
        begin = _now(polls, G)
        while standing == LATE:
            polls += 1
            seen = _look(words, wanted, HOW)
            late = wanted & _is_late(seen, number, HOW, SHIFT, G)
            standing = _standing(late, ranks, begin, polls, link, watch, G, HOW)
        if standing != COME:
            seen = tl.atomic_add(words, 0, mask=wanted, sem="acquire", scope="sys")
            late = wanted & _is_late(seen, number, HOW, SHIFT, G)
            seen = tl.where(wanted & (late == 0), seen, 0)
            if standing == OVER:
                standing = _give_up(late, ranks, number, link, watch, phase, G)
        _note_failure(watch, G)
        TICK: tl.constexpr = 1000 if G.is_compiled else 1
        spent = ((_now(polls, G) - begin) // TICK).to(tl.int64)
    if HOW == FLAG:
        tl.debug_barrier()
    elif HOW == TAGGED:
        # What warps use may have been tested by others alone, or loaded twice, for two layouts.
        seen = tl.where(standing == COME, _look(words, wanted, TAGGED), seen)
    return seen, standing < LATE, spent


@triton.jit
def _note_failure(watch, G: tl.constexpr):
    """Write down why waits end, if they do."""
    failed = tl.load(watch + FAILED, volatile=True)
    if failed != 0:
        tl.store(words_at(tl.load(watch + REPORT), 8) + G.size, failed)


@triton.jit
def _give_up(late, ranks, number, link, watch, phase, G: tl.constexpr):
    """Mask who is missing, or write it down and let every later wait end at once; which of both."""
    standing = tl.max(late.to(tl.int32)) * BROKEN
    if G.can_shrink:
        late = late & is_counted_on(link, ranks, G)
        if alike(is_enough(late, ranks, watch, G).to(tl.int32)) != 0:
            mask_everywhere(named(late, ranks, G), link, G)
            standing = standing * 0 + GONE
    if standing == BROKEN:
        word = (number.to(tl.int64) << 32) | (link.kind * 256 + phase)
        report = words_at(tl.load(watch + REPORT), 8)
        tl.store(report + ranks, word + ranks.to(tl.int64) * 0, mask=late)
        tl.store(watch + FAILED, 1)
    return standing


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
    seen = _look(words, wanted, TAGGED)
    seen, _, spent = _wait(seen, words, wanted, ranks, number, link, phase, G, TAGGED, 0)
    return (seen >> 32).to(tl.int32), spent


@triton.jit
def wait_singled(words, wanted, ranks, number, link, phase, G: tl.constexpr):
    """The same data, and whether all has come that is counted on; at these few programs look."""
    seen = _look(words, wanted, SINGLED)
    seen, come, _ = _wait(seen, words, wanted, ranks, number, link, phase, G, SINGLED, 0)
    return (seen >> 32).to(tl.int32), come


@triton.jit
def wait_flags(words, wanted, ranks, number, link, phase, G: tl.constexpr, SHIFT: tl.constexpr):
    """The same for flags that hold the number, shifted left by `SHIFT` bits of data.

    Rows that a flag covers may be read after it.
    """
    seen = _look(words, wanted, FLAG)
    seen, _, _ = _wait(seen, words, wanted, ranks, number, link, phase, G, FLAG, SHIFT)
    return seen


@triton.jit
def time_flags(words, wanted, ranks, number, link, phase, G: tl.constexpr, SHIFT: tl.constexpr):
    """How long flags were waited for, in microseconds (int64); in the interpreter in polls."""
    seen = _look(words, wanted, FLAG)
    _, _, spent = _wait(seen, words, wanted, ranks, number, link, phase, G, FLAG, SHIFT)
    return spent


@triton.jit
def read_tagged(words, wanted):
    """The data of tagged words that have come."""
    return (_look(words, wanted, TAGGED) >> 32).to(tl.int32)


@triton.jit
def read_flags(words, wanted):
    """Flags that have been raised, and the rows that they cover may be read after it."""
    seen = _look(words, wanted, FLAG)
    tl.debug_barrier()
    return seen


@triton.jit
def wait_here(word, number, link, G: tl.constexpr):
    """The data of a tagged word that another program of this kernel writes; 0 if it cannot."""
    failed = words_at(heap_of(link, link.rank), 8) + FAILED
    seen = look_alike(word)
    while (seen.to(tl.int32) != number) & (look_alike(failed) == 0):
        seen = look_alike(word)
    return tl.where(seen.to(tl.int32) == number, (seen >> 32).to(tl.int32), 0)


@triton.jit
def look_for_credit(own, kind, link, G: tl.constexpr):
    """Which round every rank has behind it, for `has_credit`: while it looks, rows can be loaded.

    Without acquire, for which they would wait: nothing is read that others wrote. What is written
    depends on what was seen, and no GPU stores before it knows whether it should.
    """
    rank = tl.arange(0, G.padded)
    words = words_at(own + link.credits, 4) + rank * G.num_states + kind
    return tl.load(words, mask=rank < G.size, other=0, volatile=True)


@triton.jit
def has_credit(seen, own, kind, number, link, phase, G: tl.constexpr):
    """Wait until every rank has the round before this one behind it, so that it reads no more.

    Returns whether all that are counted on have: where a wait failed, nobody may write to what they
    read.
    """
    rank = tl.arange(0, G.padded)
    words = words_at(own + link.credits, 4) + rank * G.num_states + kind
    asked = rank < G.size
    _, granted, _ = _wait(seen, words, asked, rank, number - 1, link, phase, G, CREDIT, 0)
    if G.can_shrink:
        granted = granted & (is_left_out(link) == 0)
    return granted


@triton.jit
def wait_for_credit(own, kind, number, link, phase, G: tl.constexpr):
    """The same, with nothing to do meanwhile."""
    seen = look_for_credit(own, kind, link, G)
    return has_credit(seen, own, kind, number, link, phase, G)
