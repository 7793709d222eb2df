"""High-throughput dispatch, while rows are sent: the ranks count.

Every rank counts the rows for each destination and tells all of them, tagged, so that each knows
where the rows of every other one begin; the host may wait for the result, to know how much memory
they take.

T tokens here, R ranks, E experts, L local experts, N received rows.

Example (2 ranks): rank 0 has two tokens, of which both go to rank 1 and the first to rank 0, rank 1
    has one, for itself -> rank_prefix_matrix [[1,2],[1,3]]
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from crossdock.ops.triton.links import Address, heap_of, words_at
from crossdock.ops.triton.rank_waits import add_wait
from crossdock.ops.triton.signals import enter, post_credit, tagged
from crossdock.ops.triton.sync import draw_ticket, time_tagged, wait_for_credit, wait_tagged

__all__ = ["Learned", "route_ranks"]

COUNTS = tl.constexpr(7)
CREDIT = tl.constexpr(8)
CELLS = tl.constexpr(4096)
"""(token, rank) pairs that are counted together."""


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
    L: tl.constexpr,
    LP: tl.constexpr,
    TIMES: tl.constexpr,
    G: tl.constexpr,
):
    """Tell how many rows go where, and learn it of the others.

    Writes `num_sent`, `rank_prefix_matrix`, the first entry of `chunks`, and the host's words.
    Peers are told that earlier rows have been placed here (rounds of `PLACED`): a rank whose own
    rows have to wait for a larger heap lets the others send meanwhile.
    """
    TIMERS: tl.constexpr = G.size if TIMES else 0
    ticket, number = draw_ticket(link, TIMERS + 2)
    own = heap_of(link, link.rank)
    if ticket == 0:
        enter(link, number, G)
        post_credit(link, link.kind, number - 1, G)
        placed = tl.load(words_at(link.states, 8) + PLACED) >> 32
        post_credit(link, PLACED, placed.to(tl.int32), G)
        _tell(own, sent, learned, link, zone, call, number, L, LP, G)
    elif ticket <= TIMERS:
        src = ticket - 1
        words = words_at(own + zone.told, 8) + src * (G.size + 2) + tl.arange(0, 1)
        first = tl.arange(0, 1) == 0
        _, spent = time_tagged(words, first, first * 0 + src, number, link, COUNTS, G)
        add_wait(received.waits, src, spent, 0, 0, number, link, COUNTS, G)
    else:
        _learn(own, received, learned, link, zone, call, number, L, LP, G)


@triton.jit
def _tell(
    own, sent, learned, link, zone, call, number, L: tl.constexpr, LP: tl.constexpr, G: tl.constexpr
):
    """Count the rows for each rank, and tell every rank these and the rest of what it needs."""
    peer, expert = tl.arange(0, G.padded), tl.arange(0, LP)
    totals = _rows_for_each(sent.is_token_in_rank, call.num_tokens, G)
    tl.store(words_at(sent.num_sent, 4) + peer, totals, mask=peer < G.size)
    granted = wait_for_credit(own, link.kind, number, link, CREDIT, G)
    SIZE: tl.constexpr = G.size
    for dst in range(SIZE * granted.to(tl.int32)):
        base = heap_of(link, dst)
        words = words_at(base + zone.told, 8) + link.rank * (G.size + 2)
        tl.store(words + peer, tagged(totals, number), mask=peer < G.size)
        tl.store(words + G.size, tagged(call.num_tokens, number))
        tl.store(words + G.size + 1, tagged(call.fingerprint, number))
        of_dst = words_at(learned.per_expert, 4) + dst * L + expert
        counts = tl.load(of_dst, mask=expert < L, other=0)
        words = words_at(base + zone.counts, 8) + link.rank * L + expert
        tl.store(words, tagged(counts, number), mask=expert < L)


@triton.jit
def _rows_for_each(is_token_in_rank, num_tokens, G: tl.constexpr):
    """How many tokens go to each rank: [R] int32.

    Example (2 ranks): is_token_in_rank [[1,1],[0,1],[1,0]], 2 tokens -> [1, 2]
    """
    peer = tl.arange(0, G.padded)
    total = peer * 0
    NUM: tl.constexpr = max(CELLS // G.padded, 16)
    for first in range(0, num_tokens, NUM):
        token = first + tl.arange(0, NUM)
        there = (token < num_tokens)[:, None] & (peer < G.size)[None, :]
        words = words_at(is_token_in_rank, 1) + token[:, None] * G.size + peer[None, :]
        goes = tl.load(words, mask=there, other=0) != 0
        total += tl.sum(goes.to(tl.int32), 0)
    return total


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
