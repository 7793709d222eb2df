"""What ranks signal to each other: flags behind rows, tagged words, and how far each of them is.

Whoever waits for these does so in `sync`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.ops.triton.links import heaps_of, words_at

__all__ = ["enter", "post_credit", "post_rounds", "raise_flags", "tagged"]


@triton.jit
def tagged(value, number):
    """A word of 32 bits of data and the number of the round."""
    return (value.to(tl.int64) << 32) | (number.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def raise_flags(words, wanted, value):
    """Write flags after all that this program has written."""
    tl.debug_barrier()
    tl.atomic_xchg(words, value, mask=wanted, sem="release", scope="sys")


@triton.jit
def post_rounds(link, number, DISPATCHES: tl.constexpr, LEAVES: tl.constexpr, G: tl.constexpr):
    """Tell every peer how many rounds of the low-latency operations this rank has behind it.

    A kernel begins when those launched before it are over, so what they read may be overwritten.
    Its own round is not behind it, though all its tickets may have been drawn. Nor is the last
    dispatch if it left rows where they landed (`LEAVES`), which the caller reads until the next
    one: its number is kept for combines.
    """
    peer, state = tl.arange(0, G.padded), tl.arange(0, 4)
    behind = (tl.load(words_at(link.states, 8) + state) >> 32).to(tl.int32)
    behind = tl.where(state == link.kind, number - 1, behind)
    left = words_at(link.states, 8) + G.num_states + state
    if DISPATCHES:
        tl.store(left, tl.where((state == link.kind) & LEAVES, number, 0), mask=state < 2)
    else:
        begun = tl.load(left, mask=state < 2, other=0).to(tl.int32)
        behind = tl.where((begun != 0) & (behind - begun >= 0), begun - 1, behind)
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
