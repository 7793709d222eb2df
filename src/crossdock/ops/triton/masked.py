"""Which ranks this one goes on without, and when it may: words in every heap, that waits look at.

R ranks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.ops.triton.links import MASKED, alike, heap_of, heaps_of, look_alike, words_at

__all__ = [
    "is_counted_on",
    "is_enough",
    "is_left_out",
    "is_masked",
    "mask_everywhere",
    "mask_ranks",
    "may_go_on",
    "named",
]


@triton.jit
def is_counted_on(link, ranks, G: tl.constexpr):
    """Whether ranks take part, seen from here: none does where the others go on without this."""
    peer = tl.arange(0, G.padded)
    is_left = (peer < G.size) & (is_masked(link, peer, peer < G.size) == 0)
    bits = tl.sum(tl.where(is_left, 1 << peer, 0))
    bits = alike(tl.where(((bits >> link.rank) & 1) != 0, bits, 0))
    return ((bits >> ranks) & 1) != 0


@triton.jit
def is_masked(link, ranks, wanted):
    """Whether this rank goes on without ranks, or they without it where it is meant itself."""
    masked = words_at(heap_of(link, link.rank), 8) + MASKED
    return tl.load(masked + ranks, mask=wanted, other=0, volatile=True) != 0


@triton.jit
def is_left_out(link):
    """Whether the others go on without this rank."""
    return look_alike(words_at(heap_of(link, link.rank), 8) + MASKED + link.rank) != 0


@triton.jit
def mask_ranks(these, link, G: tl.constexpr):
    """From now on this rank goes on without ranks, bool [R padded].

    The others may still be in the call before, to which these belong: they hear of it in this one.
    """
    peer = tl.arange(0, G.padded)
    words = words_at(heap_of(link, link.rank), 8) + MASKED + peer
    tl.store(words, peer.to(tl.int64) * 0 + 1, mask=these & (peer < G.size))


@triton.jit
def mask_everywhere(these, link, G: tl.constexpr):
    """All go on without ranks, bool [R padded], who hear of it themselves: they are late."""
    peer = tl.arange(0, G.padded)
    watch = words_at(heaps_of(link, peer, peer < G.size), 8)
    words = watch[:, None] + MASKED + peer[None, :]
    wanted = (peer[:, None] < G.size) & these[None, :]
    tl.store(words, peer[:, None] * 0 + peer[None, :].to(tl.int64) * 0 + 1, mask=wanted)


@triton.jit
def named(late, ranks, G: tl.constexpr):
    """Which ranks are among those of words, of any shape, that are late: bool [R padded]."""
    peer = tl.arange(0, G.padded)
    late, ranks = tl.ravel(late), tl.ravel(ranks + late.to(tl.int32) * 0)
    return tl.max((late[None, :] & (ranks[None, :] == peer[:, None])).to(tl.int32), 1) > 0


@triton.jit
def is_enough(late, ranks, watch, G: tl.constexpr):
    """Whether at least half of the ranks that were left remain without those that are late."""
    peer = tl.arange(0, G.padded)
    masked = tl.load(watch + MASKED + peer, mask=peer < G.size, other=1, volatile=True) != 0
    left = tl.sum((masked == 0).to(tl.int32))
    gone = tl.sum((named(late, ranks, G) & (masked == 0)).to(tl.int32))
    return 2 * (left - gone) >= left


@triton.jit
def may_go_on(late, ranks, spent, link, watch, G: tl.constexpr):
    """After the deadline: a few that are early wait for the many, but not for ever."""
    TICK: tl.constexpr = 1000 if G.is_compiled else 1
    last = spent > tl.cast(link.deadline, tl.int64) * (TICK * G.size)
    return is_enough(late, ranks, watch, G) | last
