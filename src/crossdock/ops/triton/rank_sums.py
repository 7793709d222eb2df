"""High-throughput combine in one kernel: rows are sent back, and added up.

Some programs send rows to the ranks they came from, one chunk of that rank's tokens after another,
each covered by a flag; the others wait for a chunk of this rank's own tokens from all ranks, and
add up in rank order, in float32, with one rounding at the end. Rows of this rank's own tokens are
read where they are. Roles by ticket, senders first.

T tokens here, K top-k, R ranks, M slots for the tokens of a rank, N rows, H columns, C chunks.

Example (2 ranks, H=1): the token of rank 0 went to both ranks, which return 10 and 20, and its bias
    is 1 -> rank 1 sends 20, rank 0 has 10, the token gets 31
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from crossdock.ops.triton.quantize import round_sum
from crossdock.ops.triton.rank_waits import add_wait
from crossdock.ops.triton.sync import (
    Address,
    draw_ticket,
    enter,
    heap_of,
    heaps_of,
    post_credit,
    raise_flags,
    row_at,
    tagged,
    time_tagged,
    wait_flags,
    wait_for_credit,
    wait_tagged,
    words_at,
)

__all__ = ["BackCall", "BackRow", "BackZone", "Rows", "Sums", "combine_ranks"]

KEPT = tl.constexpr(11)
CREDIT = tl.constexpr(12)
SUMS = tl.constexpr(13)


class BackRow(NamedTuple):
    """How a row is made, as constants of a kernel.

    Attributes:
        element: Triton's name of the dtype.
        hidden, padded: H, and the next power of two.
        num_bytes, word, num_words, padded_words: of a row; see `ExpertRow`.
        weights_at, stride: where float32 weights begin, and from row to row.
        num_topk, padded_topk: K; 0 without weights.
        num_bias: 0, 1 or 2.
        rows: rows that a sender moves at once.
        sums: rows that are added up at once.
        chunk: tokens that a flag covers.
    """

    element: int
    hidden: int
    padded: int
    num_bytes: int
    word: int
    num_words: int
    padded_words: int
    weights_at: int
    stride: int
    num_topk: int
    padded_topk: int
    num_bias: int
    rows: int
    sums: int
    chunk: int


class Rows(NamedTuple):
    """What goes back: x [N, H], weights [N, K], and the handle; see `Received`."""

    x: Address
    topk_weights: Address
    src_idx: Address
    rank_prefix_matrix: Address
    chunks: Address


class Sums(NamedTuple):
    """What comes: out [T, H], weights [T, K]; biases [T, H], and `send_head` [T, R].

    Also [R] int64, to which microseconds that each rank was waited for are added.
    """

    out: Address
    topk_weights: Address
    bias: Address
    more_bias: Address
    send_head: Address
    waits: Address


class BackZone(NamedTuple):
    """Offsets in the heap.

    Attributes:
        landing: [R, M] rows, by the rank that sends them.
        flags: [R, C] int32, the number of the round.
        kept: [R] tagged: rows of this rank that a rank has.
    """

    landing: Address
    flags: Address
    kept: Address


class BackCall(NamedTuple):
    """What changes from call to call: T, M, C, N, and programs.

    Attributes:
        spacing: rows from those of a source to those of the next one; 0 where there are no gaps.
    """

    num_tokens: int
    num_slots: int
    num_chunks: int
    num_rows: int
    spacing: int
    num_senders: int
    num_reducers: int


@triton.jit
def combine_ranks(
    rows, sums, link, zone, call, ROW: tl.constexpr, TIMES: tl.constexpr, G: tl.constexpr
):
    """Send rows back, and add up those that come."""
    TIMERS: tl.constexpr = G.size if TIMES else 0
    ticket, number = draw_ticket(link, call.num_senders + TIMERS + call.num_reducers)
    own = heap_of(link, link.rank)
    src = tl.arange(0, G.padded)
    if ticket < call.num_senders:
        if ticket == 0:
            enter(link, number, G)
            post_credit(link, link.kind, number - 1, G)
        wait_for_credit(own, link.kind, number, link, CREDIT, G)
        last = words_at(rows.chunks, 4) + src * 2
        from_each = tl.load(last, mask=src < G.size, other=0)
        num_sent = tl.load(last + 1, mask=src < G.size, other=0)
        if ticket == 0:
            _tell_kept(from_each, rows, link, zone, call, number, G)
        begin = _begin_of(from_each, call, G)
        others = tl.where(src == link.rank, 0, num_sent)
        for chunk in range(ticket, tl.cdiv(tl.max(others), ROW.chunk), call.num_senders):
            SIZE: tl.constexpr = G.size
            for step in tl.static_range(SIZE - 1):
                dst = (link.rank + 1 + step) % SIZE
                if chunk * ROW.chunk < tl.sum(tl.where(src == dst, num_sent, 0)):
                    first = tl.sum(tl.where(src == dst, begin, 0))
                    _send_chunk(rows, dst, chunk, first, link, zone, call, ROW, G)
            flags = words_at(heaps_of(link, src, src < G.size) + zone.flags, 4)
            flags += link.rank * call.num_chunks + chunk
            raise_flags(flags, chunk * ROW.chunk < others, number + src * 0)
    elif ticket < call.num_senders + TIMERS:
        _time(own, sums, ticket - call.num_senders, link, zone, call, number, ROW, G)
    else:
        words = words_at(own + zone.kept, 8) + src
        kept = wait_tagged(words, src < G.size, src, number, link, KEPT, G)
        mine = tl.load(
            words_at(rows.rank_prefix_matrix, 4) + (link.rank - 1) * G.size + link.rank,
            mask=tl.full([], link.rank > 0, tl.int1),
            other=0,
        )
        mine = tl.where(call.spacing > 0, link.rank * call.spacing, mine)
        num_chunks = tl.cdiv(call.num_tokens, ROW.chunk)
        nth = ticket - call.num_senders - TIMERS
        for chunk in range(nth, num_chunks, call.num_reducers):
            flags = words_at(own + zone.flags, 4) + src * call.num_chunks + chunk
            wait_flags(flags, (src < G.size) & (src != link.rank), src, number, link, SUMS, G, 0)
            CHUNK: tl.constexpr = ROW.chunk
            STEP: tl.constexpr = ROW.sums
            for offset in tl.static_range(0, CHUNK, STEP):
                _reduce(
                    own, rows, sums, kept, mine, chunk * CHUNK + offset, link, zone, call, ROW, G
                )


@triton.jit
def _begin_of(from_each, call, G: tl.constexpr):
    """The first row of each source: [R] int32."""
    after_others = tl.cumsum(from_each, 0) - from_each
    return tl.where(call.spacing > 0, tl.arange(0, G.padded) * call.spacing, after_others)


@triton.jit
def _tell_kept(from_each, rows, link, zone, call, number, G: tl.constexpr):
    """Tell every rank how many of its rows are here: some may have been too many for dispatch."""
    src = tl.arange(0, G.padded)
    begin = _begin_of(from_each, call, G)
    kept = tl.minimum(tl.maximum(call.num_rows - begin, 0), from_each)
    base = heaps_of(link, src, src < G.size)
    tl.store(words_at(base + zone.kept, 8) + link.rank, tagged(kept, number), mask=src < G.size)


@triton.jit
def _send_chunk(rows, dst, chunk, begin, link, zone, call, ROW: tl.constexpr, G: tl.constexpr):
    """Send the rows of a chunk of a rank's tokens back to it."""
    of_chunk = words_at(rows.chunks, 4) + ((1 + chunk) * G.size + dst) * 2
    first = begin + tl.load(of_chunk)
    count = tl.load(of_chunk + 1)
    base = heap_of(link, dst)
    word, slot = tl.arange(0, ROW.padded_words), tl.arange(0, ROW.padded_topk)
    for offset in range(0, count, ROW.rows):
        nth = offset + tl.arange(0, ROW.rows)
        row = first + nth
        real = (nth < count) & (row < call.num_rows)
        cells = real[:, None] & (word < ROW.num_words)[None, :]
        at = words_at(rows.x + row.to(tl.int64) * ROW.num_bytes, ROW.word)
        payload = tl.load(at[:, None] + word[None, :], mask=cells)
        token = tl.load(words_at(rows.src_idx, 4) + row, mask=real, other=0)
        to = (link.rank * call.num_slots + token).to(tl.int64) * ROW.stride + (base + zone.landing)
        tl.store(words_at(to, ROW.word)[:, None] + word[None, :], payload, mask=cells)
        if ROW.num_topk:
            few = real[:, None] & (slot < ROW.num_topk)[None, :]
            at = words_at(rows.topk_weights, 4) + row[:, None] * ROW.num_topk + slot[None, :]
            bits = tl.load(at, mask=few, other=0)
            words = words_at(to + ROW.weights_at, 4)[:, None] + slot[None, :]
            tl.store(words, bits, mask=few)


@triton.jit
def _time(own, sums, src, link, zone, call, number, ROW: tl.constexpr, G: tl.constexpr):
    """Measure how long the rows of a rank are waited for."""
    first = tl.arange(0, 1) == 0
    words = words_at(own + zone.kept, 8) + src + tl.arange(0, 1)
    _, spent = time_tagged(words, first, first * 0 + src, number, link, KEPT, G)
    flags = own + zone.flags + 4 * src * call.num_chunks
    num_flags = tl.where(src == link.rank, 0, tl.cdiv(call.num_tokens, ROW.chunk))
    add_wait(sums.waits, src, spent, flags, num_flags, number, link, SUMS, G)


@triton.jit
def _elements_at(address, ROW: tl.constexpr):
    """Pointers to the elements of rows."""
    if ROW.word == 16:
        return row_at(address, ROW.element)
    else:
        return address.to(tl.pointer_type(ROW.element), bitcast=True)


@triton.jit
def _reduce(
    own, rows, sums, kept, mine, first, link, zone, call, ROW: tl.constexpr, G: tl.constexpr
):
    """Add up the rows of a few tokens in rank order, then the biases, and round once."""
    token = first + tl.arange(0, ROW.sums)
    lane, slot, src = (
        tl.arange(0, ROW.padded),
        tl.arange(0, ROW.padded_topk),
        tl.arange(0, G.padded),
    )
    real = token < call.num_tokens
    total = tl.zeros([ROW.sums, ROW.padded], tl.float32)
    weights = tl.zeros([ROW.sums, ROW.padded_topk], tl.float32)
    SIZE: tl.constexpr = G.size
    for r in tl.static_range(SIZE):
        head = tl.load(words_at(sums.send_head, 4) + token * SIZE + r, mask=real, other=-1)
        there = (head >= 0) & (head < tl.sum(tl.where(src == r, kept, 0)))
        landed = (r * call.num_slots + token).to(tl.int64) * ROW.stride + (own + zone.landing)
        row = (mine + head).to(tl.int64)
        at = tl.where(r == link.rank, rows.x + row * ROW.num_bytes, landed)
        cells = there[:, None] & (lane < ROW.hidden)[None, :]
        begin = _elements_at(at, ROW)[:, None] + lane[None, :]
        total += tl.load(begin, mask=cells, other=0.0).to(tl.float32)
        if ROW.num_topk:
            few = there[:, None] & (slot < ROW.num_topk)[None, :]
            own_weights = rows.topk_weights + row * (4 * ROW.num_topk)
            at = tl.where(r == link.rank, own_weights, landed + ROW.weights_at)
            words = words_at(at, 4)[:, None] + slot[None, :]
            weights += tl.load(words, mask=few, other=0).to(tl.float32, bitcast=True)
    cells = real[:, None] & (lane < ROW.hidden)[None, :]
    at = token.to(tl.int64) * ROW.num_bytes
    if ROW.num_bias > 0:
        begin = _elements_at(sums.bias + at, ROW)[:, None] + lane[None, :]
        total += tl.load(begin, mask=cells, other=0.0).to(tl.float32)
    if ROW.num_bias > 1:
        begin = _elements_at(sums.more_bias + at, ROW)[:, None] + lane[None, :]
        total += tl.load(begin, mask=cells, other=0.0).to(tl.float32)
    begin = _elements_at(sums.out + at, ROW)[:, None] + lane[None, :]
    tl.store(begin, round_sum(total, ROW.element, G.is_compiled), mask=cells)
    if ROW.num_topk:
        few = real[:, None] & (slot < ROW.num_topk)[None, :]
        to = words_at(sums.topk_weights, 4) + token[:, None] * ROW.num_topk + slot[None, :]
        tl.store(to, weights.to(tl.int32, bitcast=True), mask=few)
