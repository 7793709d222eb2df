"""High-throughput dispatch: rows are sent, and rows are placed, by two kernels side by side.

`rank_routes` has numbered the rows. `send` writes a row once to every rank that wants it; where to
follows from (source, token) alone, so it need not wait for the counts of others. A few tokens
at a time (a *chunk*) are covered by one flag. `place` copies what has landed to the caller's
tensors, by source rank, then by token, chunk by chunk beside the senders: the link hides it.

Where the caller takes rows as they lie (*views*), those of a source land one after another, this
rank's own among them, and `place` only notes which they are.

T tokens here, K top-k, R ranks, E experts, L local experts, M slots for the tokens of a rank,
N received rows, C = ceil(M / chunk) chunks.

Example (2 ranks, H=1): rank 0 has x=[[10],[20]], of which both go to rank 1 and the first to rank
    0, rank 1 has x=[[30]], for itself -> send_head of rank 0 [[0,0],[-1,1]], rank_prefix_matrix
    [[1,2],[1,3]]; rank 1 receives [[10],[20],[30]]
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
    raise_flags,
    wait_flags,
    wait_for_credit,
    words_at,
)

__all__ = [
    "RankRow",
    "Received",
    "RowZone",
    "Sent",
    "SentCall",
    "place_ranks",
    "send_ranks",
]

CREDIT = tl.constexpr(8)
ROWS = tl.constexpr(9)
EMPTY = tl.constexpr(32)
"""Slots that a program marks as empty at once."""


class RankRow(NamedTuple):
    """How a row is made of bytes, as constants of a kernel.

    Attributes:
        num_bytes, word, num_words, padded_words: of the payload; see `ExpertRow`.
        scale_words, padded_scales: 32-bit words of scales.
        scales_at, choices_at: where scales, and ids (int32) with weights (float32), begin.
        stride: from row to row.
        num_topk, padded_topk: K; 0 if the call names no experts.
        has_weights: whether weights travel.
        local: L.
        rows: rows that a program moves at once, a power of two.
        chunk: tokens that a flag covers, a multiple of it.
        viewed: whether rows stay where they land, a slot for each row that is sent; otherwise there
            is one for each token.
    """

    num_bytes: int
    word: int
    num_words: int
    padded_words: int
    scale_words: int
    padded_scales: int
    scales_at: int
    choices_at: int
    stride: int
    num_topk: int
    padded_topk: int
    has_weights: bool
    local: int
    rows: int
    chunk: int
    viewed: bool


class Sent(NamedTuple):
    """This rank's tokens, and where they go.

    Attributes:
        x, scales: addresses of [T, ...] payloads and scales.
        topk_idx, topk_weights: [T, K].
        is_token_in_rank: [T, R].
        send_head: [T, R] int32, which of the rows for a rank a token is, or -1.
        num_sent: [R] int32, rows for each rank.
    """

    x: Address
    scales: Address
    topk_idx: Address
    topk_weights: Address
    is_token_in_rank: Address
    send_head: Address
    num_sent: Address


class Received(NamedTuple):
    """What comes: addresses of [N, ...] payloads and scales, and the parts of the handle.

    Attributes:
        chunks: [1 + C, R, 2] int32: rows and tokens of each source; then of each chunk its first
            row among those of its source, and how many.
        waits: [R] int64, microseconds that each source was waited for, to be added to.
    """

    x: Address
    scales: Address
    topk_idx: Address
    topk_weights: Address
    src_idx: Address
    rank_prefix_matrix: Address
    chunks: Address
    waits: Address


class RowZone(NamedTuple):
    """Offsets in the heap.

    Attributes:
        landing: [R, M] rows.
        heads: [R, M] int32, `send_head` of each token for the receiver.
        flags: [R, C] int32, the number of the round.
        told: [R, R + 2] tagged: rows for each rank, number of tokens, fingerprint of the call.
        counts: [R, L] tagged: occurrences of each of the receiver's experts.
    """

    landing: Address
    heads: Address
    flags: Address
    told: Address
    counts: Address


class SentCall(NamedTuple):
    """What changes from call to call: T, M, C, programs, N, and a fingerprint.

    Of views, N is R times the slots of each source.
    """

    num_tokens: int
    num_slots: int
    num_chunks: int
    num_programs: int
    num_rows: int
    fingerprint: int


@triton.jit
def send_ranks(sent, link, zone, call, CREDITED: tl.constexpr, ROW: tl.constexpr, G: tl.constexpr):
    """Send this rank's rows to the other ranks, chunk by chunk."""
    ticket, number = draw_ticket(link, call.num_programs)
    own = heap_of(link, link.rank)
    if ticket == 0:
        enter(link, number, G)
        post_credit(link, CREDITED, number - 1, G)
    wait_for_credit(own, CREDITED, number, link, CREDIT, G)
    peer, nth = tl.arange(0, G.padded), tl.arange(0, ROW.chunk)
    SIZE: tl.constexpr = G.size
    for chunk in range(ticket, tl.cdiv(call.num_tokens, ROW.chunk), call.num_programs):
        CHUNK: tl.constexpr = ROW.chunk
        STEP: tl.constexpr = ROW.rows
        for begin in tl.static_range(0, CHUNK, STEP):
            _send_rows(sent, chunk * CHUNK + begin, link, zone, call, ROW, G)
        token = chunk * CHUNK + nth
        real = token < call.num_tokens
        for step in tl.static_range(SIZE - 1):
            dst = (link.rank + 1 + step) % SIZE
            heads = tl.load(words_at(sent.send_head, 4) + token * SIZE + dst, mask=real, other=-1)
            words = words_at(heap_of(link, dst) + zone.heads, 4)
            tl.store(words + link.rank * call.num_slots + token, heads, mask=real)
        base = heaps_of(link, peer, peer < SIZE)
        flags = words_at(base + zone.flags, 4) + link.rank * call.num_chunks + chunk
        raise_flags(flags, (peer < SIZE) & (ROW.viewed | (peer != link.rank)), number + peer * 0)


@triton.jit
def _send_rows(sent, begin, link, zone, call, ROW: tl.constexpr, G: tl.constexpr):
    """Write a few rows to the ranks that want them."""
    token = begin + tl.arange(0, ROW.rows)
    word, scale = tl.arange(0, ROW.padded_words), tl.arange(0, ROW.padded_scales)
    slot = tl.arange(0, ROW.padded_topk)
    real = token < call.num_tokens
    cells = real[:, None] & (word < ROW.num_words)[None, :]
    at = words_at(sent.x + token.to(tl.int64) * ROW.num_bytes, ROW.word)
    payload = tl.load(at[:, None] + word[None, :], mask=cells)
    few = real[:, None] & (scale < ROW.scale_words)[None, :]
    if ROW.scale_words:
        at = words_at(sent.scales + token.to(tl.int64) * (4 * ROW.scale_words), 4)
        scales = tl.load(at[:, None] + scale[None, :], mask=few)
    SIZE: tl.constexpr = G.size
    NUM_DST: tl.constexpr = G.size if ROW.viewed else G.size - 1
    for step in tl.static_range(NUM_DST):
        dst = (link.rank + 1 + step) % SIZE
        heads = tl.load(words_at(sent.send_head, 4) + token * SIZE + dst, mask=real, other=-1)
        goes = heads >= 0
        to = heap_of(link, dst) + zone.landing
        lands = heads if ROW.viewed else token
        to += (link.rank * call.num_slots + lands).to(tl.int64) * ROW.stride
        words = words_at(to, ROW.word)[:, None] + word[None, :]
        tl.store(words, payload, mask=cells & goes[:, None])
        if ROW.scale_words:
            words = words_at(to + ROW.scales_at, 4)[:, None] + scale[None, :]
            tl.store(words, scales, mask=few & goes[:, None])
        if ROW.num_topk:
            chosen = goes[:, None] & (slot < ROW.num_topk)[None, :]
            choice = token[:, None] * ROW.num_topk + slot[None, :]
            ids = tl.load(words_at(sent.topk_idx, 8) + choice, mask=chosen, other=-1).to(tl.int32)
            words = words_at(to + ROW.choices_at, 4)[:, None] + slot[None, :]
            tl.store(words, ids, mask=chosen)
            if ROW.has_weights:
                bits = tl.load(words_at(sent.topk_weights, 4) + choice, mask=chosen, other=0)
                tl.store(words + ROW.num_topk, bits, mask=chosen)


@triton.jit
def place_ranks(
    sent,
    received,
    link,
    zone,
    call,
    ROW: tl.constexpr,
    PADS: tl.constexpr,
    TIMES: tl.constexpr,
    G: tl.constexpr,
):
    """Copy the rows that come, and those that stay, to the caller's tensors, chunk by chunk."""
    TIMERS: tl.constexpr = G.size if TIMES else 0
    ticket, number = draw_ticket(link, TIMERS + call.num_programs)
    own = heap_of(link, link.rank)
    src = tl.arange(0, G.padded)
    last = words_at(received.chunks, 4) + src * 2
    num_rows = tl.load(last, mask=src < G.size, other=0)
    num_sent = tl.load(last + 1, mask=src < G.size, other=0)
    num_sent = tl.minimum(num_sent, call.num_slots)
    if ticket < TIMERS:
        tokens = tl.sum(tl.where((src == ticket) & (src != link.rank), num_sent, 0))
        flags = own + zone.flags + 4 * ticket * call.num_chunks
        num_flags = tl.cdiv(tokens, ROW.chunk)
        spent = tl.cast(0, tl.int64)
        add_wait(received.waits, ticket, spent, flags, num_flags, number, link, ROWS, G)
    else:
        nth = ticket - TIMERS
        _place(own, sent, received, nth, num_rows, num_sent, link, zone, call, number, ROW, G)
        if ROW.viewed:
            _mark_empty(received, nth, num_rows, call, ROW, G)
        elif PADS:
            begin = tl.sum(num_rows) + nth * ROW.rows
            for row in range(begin, call.num_rows, call.num_programs * ROW.rows):
                _pad(received, row, call, ROW)


@triton.jit
def _place(
    own,
    sent,
    received,
    nth,
    num_rows,
    num_sent,
    link,
    zone,
    call,
    number,
    ROW: tl.constexpr,
    G: tl.constexpr,
):
    """Copy the rows of every so many chunks, one rank after another."""
    src = tl.arange(0, G.padded)
    num_items = G.size * tl.cdiv(tl.max(num_sent), ROW.chunk)
    for item in range(nth, num_items, call.num_programs):
        rank = (link.rank + item) % G.size
        if item // G.size * ROW.chunk < tl.sum(tl.where(src == rank, num_sent, 0)):
            begin = tl.sum(tl.where(src < rank, num_rows, 0))
            if ROW.viewed:
                begin = rank * (call.num_rows // G.size)
            tokens = tl.sum(tl.where(src == rank, num_sent, 0))
            _place_chunk(
                own,
                sent,
                received,
                rank,
                item // G.size,
                begin,
                tokens,
                link,
                zone,
                call,
                number,
                ROW,
                G,
            )


@triton.jit
def _place_chunk(
    own,
    sent,
    received,
    src,
    chunk,
    begin,
    num_tokens,
    link,
    zone,
    call,
    number,
    ROW: tl.constexpr,
    G: tl.constexpr,
):
    """Copy the rows of a chunk once they have come, and remember which they are."""
    if ROW.viewed | (src != link.rank):
        one = tl.arange(0, 2)
        flags = words_at(own + zone.flags, 4) + src * call.num_chunks + chunk + one
        wait_flags(flags, one == 0, one * 0 + src, number, link, ROWS, G, 0)
    CHUNK: tl.constexpr = ROW.chunk
    STEP: tl.constexpr = ROW.rows
    if not ROW.viewed:
        for offset in tl.static_range(0, CHUNK, STEP):
            token = chunk * CHUNK + offset + tl.arange(0, STEP)
            _place_rows(
                own, sent, received, src, token, begin, num_tokens, link, zone, call, ROW, G
            )
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    heads = _heads_of(own, sent, src, token, num_tokens, link, zone, call, G)
    if ROW.viewed:
        _note_rows(own, sent, received, src, token, begin, heads, link, zone, call, ROW, G)
    words = words_at(received.chunks, 4) + ((1 + chunk) * G.size + src) * 2
    tl.store(words, tl.min(tl.where(heads >= 0, heads, 0x7FFFFFFF)))
    tl.store(words + 1, tl.sum((heads >= 0).to(tl.int32)))


@triton.jit
def _heads_of(own, sent, src, token, num_tokens, link, zone, call, G: tl.constexpr):
    """Which of the rows for this rank tokens of a rank are, or -1."""
    at = own + zone.heads + 4 * tl.cast(src * call.num_slots, tl.int64)
    words = words_at(at, 4) + token
    if src == link.rank:
        words = words_at(sent.send_head, 4) + token * G.size + src
    return tl.load(words, mask=token < num_tokens, other=-1)


@triton.jit
def _place_rows(
    own,
    sent,
    received,
    src,
    token,
    begin,
    num_tokens,
    link,
    zone,
    call,
    ROW: tl.constexpr,
    G: tl.constexpr,
):
    """Copy a few rows: this rank's own from where they are, the others' from the landing zone."""
    slot = tl.arange(0, ROW.padded_topk)
    word, scale = tl.arange(0, ROW.padded_words), tl.arange(0, ROW.padded_scales)
    landed = (src * call.num_slots + token).to(tl.int64) * ROW.stride + (own + zone.landing)
    payload_at, scales_at = landed, landed + ROW.scales_at
    if src == link.rank:
        payload_at = sent.x + token.to(tl.int64) * ROW.num_bytes
        scales_at = sent.scales + token.to(tl.int64) * (4 * ROW.scale_words)
    # Rows are loaded before it is known whether they are there, for then they come together.
    real = (token < num_tokens)[:, None]
    cells = real & (word < ROW.num_words)[None, :]
    payload = tl.load(words_at(payload_at, ROW.word)[:, None] + word[None, :], mask=cells)
    few = real & (scale < ROW.scale_words)[None, :]
    if ROW.scale_words:
        scales = tl.load(words_at(scales_at, 4)[:, None] + scale[None, :], mask=few)
    heads = _heads_of(own, sent, src, token, num_tokens, link, zone, call, G)
    row = begin + heads
    kept = (heads >= 0) & (row < call.num_rows)
    to = words_at(received.x + row.to(tl.int64) * ROW.num_bytes, ROW.word)
    tl.store(to[:, None] + word[None, :], payload, mask=cells & kept[:, None])
    if ROW.scale_words:
        to = words_at(received.scales + row.to(tl.int64) * (4 * ROW.scale_words), 4)
        tl.store(to[:, None] + scale[None, :], scales, mask=few & kept[:, None])
    tl.store(words_at(received.src_idx, 4) + row, token, mask=kept)
    if ROW.num_topk:
        chosen = kept[:, None] & (slot < ROW.num_topk)[None, :]
        _place_choices(sent, received, src, token, row, landed, chosen, link, ROW)


@triton.jit
def _note_rows(
    own,
    sent,
    received,
    src,
    token,
    begin,
    heads,
    link,
    zone,
    call,
    ROW: tl.constexpr,
    G: tl.constexpr,
):
    """Remember which tokens a few rows are that stay where they have landed, and their choices."""
    slot = tl.arange(0, ROW.padded_topk)
    kept = (heads >= 0) & (heads < call.num_rows // G.size)
    landed = (src * call.num_slots + heads).to(tl.int64) * ROW.stride + (own + zone.landing)
    tl.store(words_at(received.src_idx, 4) + begin + heads, token, mask=kept)
    if ROW.num_topk:
        chosen = kept[:, None] & (slot < ROW.num_topk)[None, :]
        _place_choices(sent, received, src, token, begin + heads, landed, chosen, link, ROW)


@triton.jit
def _place_choices(sent, received, src, token, row, landed, chosen, link, ROW: tl.constexpr):
    """Copy the choices of a few tokens: local ids, -1 and weight 0 where they are not for here."""
    slot = tl.arange(0, ROW.padded_topk)
    words = words_at(landed + ROW.choices_at, 4)[:, None] + slot[None, :]
    bits = chosen.to(tl.int32)
    if src == link.rank:
        choice = token[:, None] * ROW.num_topk + slot[None, :]
        ids = tl.load(words_at(sent.topk_idx, 8) + choice, mask=chosen, other=-1).to(tl.int32)
        if ROW.has_weights:
            bits = tl.load(words_at(sent.topk_weights, 4) + choice, mask=chosen, other=0)
    else:
        ids = tl.load(words, mask=chosen, other=-1)
        if ROW.has_weights:
            bits = tl.load(words + ROW.num_topk, mask=chosen, other=0)
    local = ids - link.rank * ROW.local
    here = (local >= 0) & (local < ROW.local)
    to = row[:, None] * ROW.num_topk + slot[None, :]
    where = words_at(received.topk_idx, 8) + to
    tl.store(where, tl.where(here, local, -1).to(tl.int64), mask=chosen)
    if ROW.has_weights:
        tl.store(words_at(received.topk_weights, 4) + to, tl.where(here, bits, 0), mask=chosen)


@triton.jit
def _mark_empty(received, nth, num_rows, call, ROW: tl.constexpr, G: tl.constexpr):
    """Let no choice be made for the slots behind the rows of each source."""
    src = tl.arange(0, G.padded)
    num_slots = call.num_rows // G.size
    SIZE: tl.constexpr = G.size
    for rank in tl.static_range(SIZE):
        there = tl.sum(tl.where(src == rank, num_rows, 0))
        for begin in range(there + nth * EMPTY, num_slots, call.num_programs * EMPTY):
            row = begin + tl.arange(0, EMPTY)
            _pad_choices(received, rank * num_slots + row, row < num_slots, ROW)


@triton.jit
def _pad(received, begin, call, ROW: tl.constexpr):
    """Make a few rows behind those that have come empty."""
    row = begin + tl.arange(0, ROW.rows)
    word, scale = tl.arange(0, ROW.padded_words), tl.arange(0, ROW.padded_scales)
    real = row < call.num_rows
    cells = real[:, None] & (word < ROW.num_words)[None, :]
    to = words_at(received.x + row.to(tl.int64) * ROW.num_bytes, ROW.word)
    tl.store(to[:, None] + word[None, :], tl.zeros(cells.shape, to.dtype.element_ty), mask=cells)
    if ROW.scale_words:
        few = real[:, None] & (scale < ROW.scale_words)[None, :]
        to = words_at(received.scales + row.to(tl.int64) * (4 * ROW.scale_words), 4)
        tl.store(to[:, None] + scale[None, :], tl.zeros(few.shape, tl.int32), mask=few)
    _pad_choices(received, row, real, ROW)


@triton.jit
def _pad_choices(received, row, real, ROW: tl.constexpr):
    """Make the choices of a few rows empty: -1, with weight 0."""
    slot = tl.arange(0, ROW.padded_topk)
    tl.store(words_at(received.src_idx, 4) + row, row * 0, mask=real)
    if ROW.num_topk:
        chosen = real[:, None] & (slot < ROW.num_topk)[None, :]
        to = row[:, None] * ROW.num_topk + slot[None, :]
        tl.store(
            words_at(received.topk_idx, 8) + to, tl.full(chosen.shape, -1, tl.int64), mask=chosen
        )
        if ROW.has_weights:
            weights = words_at(received.topk_weights, 4) + to
            tl.store(weights, tl.zeros(chosen.shape, tl.int32), mask=chosen)
