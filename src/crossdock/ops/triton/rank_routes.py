"""High-throughput dispatch, before rows are sent: the ranks count.

One kernel numbers the rows of every destination and tells the counts, tagged, so that every rank
knows where the rows of each other one begin; the host may wait for the result, to know how much
memory they take.

T tokens here, R ranks, E experts, L local experts, N received rows.

Example (2 ranks): rank 0 has two tokens, of which both go to rank 1 and the first to rank 0, rank 1
    has one, for itself -> send_head of rank 0 [[0,0],[-1,1]], rank_prefix_matrix [[1,2],[1,3]]
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from crossdock.ops.triton.rank_waits import add_wait
from crossdock.ops.triton.sync import (
    Address,
    draw_ticket,
    enter,
    heap_of,
    heaps_of,
    post_credit,
    tagged,
    time_tagged,
    wait_for_credit,
    wait_tagged,
    words_at,
)

__all__ = ["Learned", "route_ranks"]

COUNTS = tl.constexpr(7)
CREDIT = tl.constexpr(8)


class Learned(NamedTuple):
    """What `route` reads and writes beside: [E] int32, words for the host, and a multiple.

    Attributes:
        per_expert: occurrences of each expert among this rank's choices.
        host: int64: 1 when done, largest number of tokens, N, then R fingerprints and the rows of
            each local expert, rounded up.
        alignment: to a multiple of this.
    """

    per_expert: Address
    host: Address
    alignment: int


@triton.jit
def route_ranks(
    sent,
    received,
    learned,
    link,
    zone,
    call,
    PLACED: tl.constexpr,
    BLOCK: tl.constexpr,
    L: tl.constexpr,
    LP: tl.constexpr,
    TIMES: tl.constexpr,
    G: tl.constexpr,
):
    """Number the rows of every destination, tell the counts, and learn those of the others.

    Writes `send_head`, `rank_prefix_matrix`, the first entry of `chunks`, and the host's words.
    Peers are told that earlier rows have been placed here (rounds of `PLACED`): a rank whose own
    rows have to wait for a larger heap lets the others send meanwhile.
    """
    TIMERS: tl.constexpr = G.size if TIMES else 0
    ticket, number = draw_ticket(link, G.size + TIMERS + 2)
    own = heap_of(link, link.rank)
    at = zone.told + 8 * link.rank * (G.size + 2)
    if ticket == 0:
        enter(link, number, G)
        post_credit(link, link.kind, number - 1, G)
        placed = tl.load(words_at(link.states, 8) + PLACED) >> 32
        post_credit(link, PLACED, placed.to(tl.int32), G)
        wait_for_credit(own, link.kind, number, link, CREDIT, G)
        _tell(link, at + 8 * G.size, call.num_tokens, number, G)
        _tell(link, at + 8 * G.size + 8, call.fingerprint, number, G)
        expert = tl.arange(0, LP)
        SIZE: tl.constexpr = G.size
        for dst in tl.static_range(SIZE):
            counts = tl.load(
                words_at(learned.per_expert, 4) + dst * L + expert, mask=expert < L, other=0
            )
            words = words_at(heap_of(link, dst) + zone.counts, 8) + link.rank * L + expert
            tl.store(words, tagged(counts, number), mask=expert < L)
    elif ticket <= G.size:
        total = _number_rows(sent, ticket - 1, call, BLOCK, G)
        wait_for_credit(own, link.kind, number, link, CREDIT, G)
        _tell(link, at + 8 * (ticket - 1), total, number, G)
    elif ticket <= G.size + TIMERS:
        src = ticket - G.size - 1
        words = words_at(own + zone.told, 8) + src * (G.size + 2) + tl.arange(0, 1)
        first = tl.arange(0, 1) == 0
        _, spent = time_tagged(words, first, first * 0 + src, number, link, COUNTS, G)
        add_wait(received.waits, src, spent, 0, 0, number, link, COUNTS, G)
    else:
        _learn(own, received, learned, link, zone, call, number, L, LP, G)


@triton.jit
def _number_rows(sent, dst, call, BLOCK: tl.constexpr, G: tl.constexpr):
    """Which of the rows for a rank each token is; returns how many there are."""
    total = dst * 0
    for begin in range(0, call.num_tokens, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        word = token * G.size + dst
        goes = (
            tl.load(
                words_at(sent.is_token_in_rank, 1) + word, mask=token < call.num_tokens, other=0
            )
            != 0
        )
        nth = tl.cumsum(goes.to(tl.int32), 0)
        head = tl.where(goes, total + nth - 1, -1)
        tl.store(words_at(sent.send_head, 4) + word, head, mask=token < call.num_tokens)
        total += tl.max(nth)
    tl.store(words_at(sent.num_sent, 4) + dst, total)
    return total


@triton.jit
def _tell(link, offset, value, number, G: tl.constexpr):
    """Write a tagged word at every rank."""
    peer = tl.arange(0, G.padded)
    base = heaps_of(link, peer, peer < G.size)
    tl.store(words_at(base + offset, 8), tagged(peer * 0 + value, number), mask=peer < G.size)


@triton.jit
def _learn(
    own,
    received,
    learned,
    link,
    zone,
    call,
    number,
    L: tl.constexpr,
    LP: tl.constexpr,
    G: tl.constexpr,
):
    """Lay out what comes here, and let the host know."""
    src, dst, expert = tl.arange(0, G.padded), tl.arange(0, G.padded), tl.arange(0, LP)
    words = words_at(own + zone.told, 8) + src * (G.size + 2)
    real = (src < G.size)[:, None] & (dst < G.size)[None, :]
    ranks = src[:, None] + dst[None, :] * 0
    rows = wait_tagged(words[:, None] + dst[None, :], real, ranks, number, link, COUNTS, G)
    matrix = words_at(received.rank_prefix_matrix, 4) + src[:, None] * G.size + dst[None, :]
    tl.store(matrix, tl.cumsum(rows, 0), mask=real)
    tokens = wait_tagged(words + G.size, src < G.size, src, number, link, COUNTS, G)
    prints = wait_tagged(words + G.size + 1, src < G.size, src, number, link, COUNTS, G)
    from_each = tl.sum(tl.where(dst[None, :] == link.rank, rows, 0), 1)
    last = words_at(received.chunks, 4) + src * 2
    tl.store(last, from_each, mask=src < G.size)
    tl.store(last + 1, tokens, mask=src < G.size)
    words = words_at(own + zone.counts, 8) + src[:, None] * L + expert[None, :]
    real = (src < G.size)[:, None] & (expert < L)[None, :]
    ranks = src[:, None] + expert[None, :] * 0
    counts = tl.sum(wait_tagged(words, real, ranks, number, link, COUNTS, G), 0)
    aligned = (counts + learned.alignment - 1) // learned.alignment * learned.alignment
    begin = words_at(learned.host, 8)
    tl.store(begin + 3 + src, prints.to(tl.int64), mask=src < G.size)
    tl.store(begin + 3 + G.size + expert, aligned.to(tl.int64), mask=expert < L)
    tl.store(begin + 1, tl.max(tokens).to(tl.int64))
    tl.store(begin + 2, tl.sum(from_each).to(tl.int64))
    tl.debug_barrier()
    tl.atomic_xchg(begin, 1, sem="release", scope="sys")
