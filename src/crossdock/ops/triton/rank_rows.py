"""High-throughput dispatch: rows are sent, while `rank_places` places those that come.

A row is written once to every rank that wants it. Where to follows from (source, token) alone, so
nobody waits for the counts of others: while rows travel, `rank_routes` learns them. A few tokens at
a time are covered by one flag. With them goes what the receiver has to know: which of
the rows for it each token is, and what the tokens chose, in one piece, the same for all ranks.

Where the caller takes rows as they lie (*views*), those of a source land one after another, this
rank's own among them.

T tokens here, K top-k, R ranks.

Example (2 ranks, H=1): rank 0 has x=[[10],[20]], of which both go to rank 1 and the first to rank
    0, rank 1 has x=[[30]], for itself -> send_head of rank 0 [[0,0],[-1,1]]; in rank 1 10 and 20
    land in the first two slots for rank 0
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.ops.triton.row_checks import sums_of
from crossdock.ops.triton.sync import (
    draw_ticket,
    enter,
    heap_of,
    heaps_of,
    post_credit,
    raise_flags,
    wait_for_credit,
    words_at,
)

__all__ = ["rows_among", "send_ranks"]

CREDIT = tl.constexpr(8)
AT_ONCE = tl.constexpr(256)
"""Tokens that are counted together."""


@triton.jit
def send_ranks(
    sent,
    link,
    zone,
    call,
    CREDITED: tl.constexpr,
    ROW: tl.constexpr,
    NUMBERS: tl.constexpr,
    G: tl.constexpr,
):
    """Send this rank's rows, chunk by chunk; they are numbered on the way if `NUMBERS`."""
    ticket, number = draw_ticket(link, call.num_programs)
    if ticket == 0:
        enter(link, number, G)
        post_credit(link, CREDITED, number - 1, G)
    wait_for_credit(heap_of(link, link.rank), CREDITED, number, link, CREDIT, G)
    peer = tl.arange(0, G.padded)
    heaps = heaps_of(link, peer, peer < G.size)
    CHUNK: tl.constexpr = ROW.chunk
    # What comes next is loaded and numbered while rows are on their way.
    before = _number_rows(sent, ticket, peer * 0, call, ROW, NUMBERS, G)
    rows = _load_rows(sent, ticket * CHUNK, call, ROW)
    for chunk in range(ticket, tl.cdiv(call.num_tokens, CHUNK), call.num_programs):
        following = chunk + call.num_programs
        ids, weights = _load_choices(sent, chunk, call, ROW)
        for begin in range(chunk * CHUNK, chunk * CHUNK + CHUNK, ROW.rows):
            then = begin + ROW.rows
            then = tl.where(then % CHUNK == 0, following * CHUNK, then)
            ahead = _load_rows(sent, then, call, ROW)
            _store_rows(sent, rows, begin, link, zone, call, ROW, G)
            rows = ahead
        before = _number_rows(sent, following, before, call, ROW, NUMBERS, G)
        _describe_rows(sent, chunk, ids, weights, link, zone, call, ROW, G)
        UNITS: tl.constexpr = CHUNK // ROW.unit
        unit = chunk * UNITS + tl.arange(0, UNITS)
        words = words_at(heaps + zone.flags, 4)[:, None] + unit[None, :]
        there = (peer < G.size)[:, None] & (unit * ROW.unit < call.num_tokens)[None, :]
        numbers = number + (peer[:, None] + unit[None, :]) * 0
        raise_flags(words + link.rank * call.num_flags, there, numbers)


@triton.jit
def rows_among(is_token_in_rank, begin, end, G: tl.constexpr):
    """How many of the tokens from one to another go to each rank: [R] int32.

    Example (2 ranks): is_token_in_rank [[1,1],[0,1],[1,0]], from 0 to 2 -> [1, 2]
    """
    peer = tl.arange(0, G.padded)
    total = peer * 0
    for first in range(begin, end, AT_ONCE):
        token = first + tl.arange(0, AT_ONCE)
        there = (token < end)[:, None] & (peer < G.size)[None, :]
        words = words_at(is_token_in_rank, 1) + token[:, None] * G.size + peer[None, :]
        goes = tl.load(words, mask=there, other=0) != 0
        total += tl.sum(goes.to(tl.int32), 0)
    return total


@triton.jit
def _number_rows(
    sent, chunk, before, call, ROW: tl.constexpr, NUMBERS: tl.constexpr, G: tl.constexpr
):
    """Write `send_head` of a chunk's tokens; `before` are the rows up to this program's last chunk.

    Returns the rows for each rank up to the end of this one.
    """
    if NUMBERS:
        peer = tl.arange(0, G.padded)
        behind = tl.maximum(chunk + 1 - call.num_programs, 0) * ROW.chunk
        begin = tl.minimum(chunk * ROW.chunk, call.num_tokens)
        before += rows_among(sent.is_token_in_rank, behind, begin, G)
        token = begin + tl.arange(0, ROW.chunk)
        there = (token < call.num_tokens)[:, None] & (peer < G.size)[None, :]
        word = token[:, None] * G.size + peer[None, :]
        goes = tl.load(words_at(sent.is_token_in_rank, 1) + word, mask=there, other=0) != 0
        count = tl.cumsum(goes.to(tl.int32), 0)
        heads = tl.where(goes, before[None, :] + count - 1, -1)
        tl.store(words_at(sent.send_head, 4) + word, heads, mask=there)
        before += tl.max(count, 0)
        tl.debug_barrier()
    return before


@triton.jit
def _load_rows(sent, begin, call, ROW: tl.constexpr):
    """Payload and scales of a few tokens."""
    token = begin + tl.arange(0, ROW.rows)
    word, scale = tl.arange(0, ROW.padded_words), tl.arange(0, ROW.padded_scales)
    real = token < call.num_tokens
    at = words_at(sent.x + token.to(tl.int64) * ROW.num_bytes, ROW.word)
    payload = tl.load(
        at[:, None] + word[None, :], mask=real[:, None] & (word < ROW.num_words)[None, :]
    )
    scales = tl.zeros([ROW.rows, ROW.padded_scales], tl.int32)
    if ROW.scale_words:
        at = words_at(sent.scales + token.to(tl.int64) * (4 * ROW.scale_words), 4)
        scales = tl.load(
            at[:, None] + scale[None, :], mask=real[:, None] & (scale < ROW.scale_words)[None, :]
        )
    return payload, scales


@triton.jit
def _load_choices(sent, chunk, call, ROW: tl.constexpr):
    """The ids and weights that the tokens of a chunk chose, one after another."""
    nth = tl.arange(0, ROW.chunk * ROW.padded_topk)
    choice = chunk * (ROW.chunk * ROW.num_topk) + nth
    chosen = (nth < ROW.chunk * ROW.num_topk) & (choice < call.num_tokens * ROW.num_topk)
    ids, weights = nth, nth
    if ROW.num_topk:
        ids = tl.load(words_at(sent.topk_idx, 8) + choice, mask=chosen, other=-1).to(tl.int32)
    if ROW.has_weights:
        weights = tl.load(words_at(sent.topk_weights, 4) + choice, mask=chosen, other=0)
    return ids, weights


@triton.jit
def _store_rows(sent, rows, begin, link, zone, call, ROW: tl.constexpr, G: tl.constexpr):
    """Write a few rows to the ranks that want them.

    Who these are is loaded before anything is stored, for loads do not overtake stores.
    """
    payload, scales = rows
    token = begin + tl.arange(0, ROW.rows)
    word, scale = tl.arange(0, ROW.padded_words), tl.arange(0, ROW.padded_scales)
    SIZE: tl.constexpr = G.size
    NUM_DST: tl.constexpr = G.size if ROW.viewed else G.size - 1
    heads, heaps = (), ()
    for step in tl.static_range(NUM_DST):
        # Neither all ranks nor all programs of one write to the same rank at a time.
        dst = (link.rank + 1 + (begin // ROW.chunk + step) % NUM_DST) % SIZE
        words = words_at(sent.send_head, 4) + token * SIZE + dst
        heads = heads + (tl.load(words, mask=token < call.num_tokens, other=-1),)
        heaps = heaps + (heap_of(link, dst),)
    for step in tl.static_range(NUM_DST):
        goes = (heads[step] >= 0)[:, None]
        lands = heads[step] if ROW.viewed else token
        to = (link.rank * call.num_slots + lands).to(tl.int64) * ROW.stride
        to += heaps[step] + zone.landing
        words = words_at(to, ROW.word)[:, None] + word[None, :]
        tl.store(words, payload, mask=goes & (word < ROW.num_words)[None, :])
        if ROW.scale_words:
            words = words_at(to + ROW.scales_at, 4)[:, None] + scale[None, :]
            tl.store(words, scales, mask=goes & (scale < ROW.scale_words)[None, :])
        if ROW.checked:
            sums = sums_of(tl.where(goes & (word < ROW.num_words)[None, :], payload, 0))
            tl.store(words_at(to + ROW.check_at, 8), sums, mask=heads[step] >= 0)


@triton.jit
def _describe_rows(sent, chunk, ids, weights, link, zone, call, ROW: tl.constexpr, G: tl.constexpr):
    """Tell all ranks, this one too, which rows a chunk's tokens are there, and what they chose."""
    token = chunk * ROW.chunk + tl.arange(0, ROW.chunk)
    nth = tl.arange(0, ROW.chunk * ROW.padded_topk)
    choice = chunk * (ROW.chunk * ROW.num_topk) + nth
    chosen = (nth < ROW.chunk * ROW.num_topk) & (choice < call.num_tokens * ROW.num_topk)
    SIZE: tl.constexpr = G.size
    heads, heaps = (), ()
    for dst in tl.static_range(SIZE):
        words = words_at(sent.send_head, 4) + token * SIZE + dst
        heads = heads + (tl.load(words, mask=token < call.num_tokens, other=-1),)
        heaps = heaps + (heap_of(link, dst),)
    first = tl.cast(link.rank * call.num_slots, tl.int64)
    for dst in tl.static_range(SIZE):
        words = words_at(heaps[dst] + zone.heads, 4) + first + token
        tl.store(words, heads[dst], mask=token < call.num_tokens)
        words = words_at(heaps[dst] + zone.choices, 4) + first * ROW.num_topk + choice
        if ROW.num_topk:
            tl.store(words, ids, mask=chosen)
        if ROW.has_weights:
            tl.store(words + SIZE * call.num_slots * ROW.num_topk, weights, mask=chosen)
