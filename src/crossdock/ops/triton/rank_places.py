"""High-throughput dispatch: rows that have come are placed, beside the kernel that sends.

They go to the caller's tensors, by source rank, then by token, chunk by chunk: the link hides it.
This rank's own rows are taken from where they are, when it has sent the others of their chunk.
*Views* stay where they lie, and only which they are is noted.

T tokens here, K top-k, R ranks, L local experts, M slots for the tokens of a rank, N received rows.

Example (2 ranks, H=1): rank 0 has x=[[10],[20]], of which both go to rank 1 and the first to rank
    0, rank 1 has x=[[30]], for itself -> rank_prefix_matrix [[1,2],[1,3]]; rank 1 receives
    [[10],[20],[30]]
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.ops.triton.links import heap_of, words_at
from crossdock.ops.triton.rank_waits import add_wait
from crossdock.ops.triton.row_checks import check_sums, sums_of
from crossdock.ops.triton.sync import draw_ticket, wait_flags

__all__ = ["place_ranks"]

ROWS = tl.constexpr(9)
EMPTY = tl.constexpr(32)
"""Slots that a program marks as empty at once."""


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
        flags = own + zone.flags + 4 * ticket * call.num_flags
        num_flags = tl.cdiv(tokens, ROW.unit)
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
    CHUNK: tl.constexpr = ROW.chunk
    STEP: tl.constexpr = ROW.rows
    num_items = G.size * tl.cdiv(tl.max(num_sent), CHUNK)
    words = words_at(own + zone.numbered, 4) + src
    wait_flags(words, src < G.size, src, number, link, ROWS, G, 0)
    # What comes next is waited for and loaded before what has come is stored.
    described, rows = _await(own, sent, nth, num_items, num_sent, link, zone, call, number, ROW, G)
    for item in range(nth, num_items, call.num_programs):
        rank, chunk = (link.rank + item) % G.size, item // G.size
        begin = tl.sum(tl.where(src < rank, num_rows, 0))
        limit = call.num_rows - begin
        if ROW.viewed:
            limit = call.num_rows // G.size
            begin = rank * limit
        tokens = tl.sum(tl.where(src == rank, num_sent, 0))
        if ROW.viewed & ROW.checked:
            _check_views(own, rank, chunk * CHUNK, tokens, link, zone, call, number, ROW, G)
        if not ROW.viewed:
            for then in tl.static_range(STEP, CHUNK, STEP):
                first = chunk * CHUNK + then
                ahead = _load_rows(own, sent, rank, first, tokens, link, zone, call, number, ROW, G)
                _store_rows(received, rows, begin, limit, ROW)
                rows = ahead
        following, ahead = _await(
            own,
            sent,
            item + call.num_programs,
            num_items,
            num_sent,
            link,
            zone,
            call,
            number,
            ROW,
            G,
        )
        if not ROW.viewed:
            _store_rows(received, rows, begin, limit, ROW)
        if chunk * CHUNK < tokens:
            _describe_chunk(received, described, rank, chunk, begin, limit, tokens, link, ROW, G)
        described, rows = following, ahead


@triton.jit
def _await(
    own,
    sent,
    item,
    num_items,
    num_sent,
    link,
    zone,
    call,
    number,
    ROW: tl.constexpr,
    G: tl.constexpr,
):
    """What comes with a chunk, if there is one, and its first rows, when they have come."""
    src = tl.arange(0, G.padded)
    rank, first = (link.rank + item) % G.size, item // G.size * ROW.chunk
    tokens = tl.sum(tl.where((src == rank) & (item < num_items), num_sent, 0))
    UNITS: tl.constexpr = ROW.chunk // ROW.unit
    unit = first // ROW.unit + tl.arange(0, UNITS)
    flags = words_at(own + zone.flags, 4) + rank * call.num_flags + unit
    wait_flags(flags, unit * ROW.unit < tokens, unit * 0 + rank, number, link, ROWS, G, 0)
    described = _load_described(own, rank, first, tokens, zone, call, ROW, G)
    rows = described
    if not ROW.viewed:
        rows = _load_rows(own, sent, rank, first, tokens, link, zone, call, number, ROW, G)
    return described, rows


@triton.jit
def _heads_of(own, src, token, num_tokens, zone, call):
    """Which of the rows for this rank tokens of a rank are, or -1."""
    words = words_at(own + zone.heads, 4) + tl.cast(src * call.num_slots, tl.int64) + token
    return tl.load(words, mask=token < num_tokens, other=-1)


@triton.jit
def _load_rows(
    own, sent, src, first, num_tokens, link, zone, call, number, ROW: tl.constexpr, G: tl.constexpr
):
    """A few rows, those that have not been sent among them: of tokens, not of heads.

    So they need not wait until it is known which of them are there.
    """
    token = first + tl.arange(0, ROW.rows)
    word, scale = tl.arange(0, ROW.padded_words), tl.arange(0, ROW.padded_scales)
    payload_at = (src * call.num_slots + token).to(tl.int64) * ROW.stride + (own + zone.landing)
    scales_at = payload_at + ROW.scales_at
    if src == link.rank:
        payload_at = sent.x + token.to(tl.int64) * ROW.num_bytes
        scales_at = sent.scales + token.to(tl.int64) * (4 * ROW.scale_words)
    real = (token < num_tokens)[:, None]
    words = words_at(payload_at, ROW.word)[:, None] + word[None, :]
    payload = tl.load(words, mask=real & (word < ROW.num_words)[None, :])
    scales = tl.zeros([ROW.rows, ROW.padded_scales], tl.int32)
    if ROW.scale_words:
        words = words_at(scales_at, 4)[:, None] + scale[None, :]
        scales = tl.load(words, mask=real & (scale < ROW.scale_words)[None, :])
    heads = _heads_of(own, src, token, num_tokens, zone, call)
    if ROW.checked & (src != link.rank):
        sums = sums_of(tl.where(real & (word < ROW.num_words)[None, :], payload, 0))
        told = tl.load(words_at(payload_at + ROW.check_at, 8), mask=token < num_tokens, other=0)
        check_sums(sums, told, heads >= 0, src, number, link, G)
    return payload, scales, heads


@triton.jit
def _check_views(
    own, src, begin, num_tokens, link, zone, call, number, ROW: tl.constexpr, G: tl.constexpr
):
    """Look at the sums of the rows of a chunk, which stay where they are."""
    word = tl.arange(0, ROW.padded_words)
    for first in range(begin, begin + ROW.chunk, ROW.rows):
        token = first + tl.arange(0, ROW.rows)
        heads = _heads_of(own, src, token, num_tokens, zone, call)
        is_here = (heads >= 0) & (heads < call.num_slots)
        at = (src * call.num_slots + heads).to(tl.int64) * ROW.stride + (own + zone.landing)
        words = words_at(at, ROW.word)[:, None] + word[None, :]
        rows = tl.load(words, mask=is_here[:, None] & (word < ROW.num_words)[None, :], other=0)
        told = tl.load(words_at(at + ROW.check_at, 8), mask=is_here, other=0)
        check_sums(sums_of(rows), told, is_here, src, number, link, G)


@triton.jit
def _store_rows(received, rows, begin, limit, ROW: tl.constexpr):
    """Write a few rows to the caller's tensors."""
    payload, scales, heads = rows
    row = (begin + heads).to(tl.int64)
    kept = ((heads >= 0) & (heads < limit))[:, None]
    word, scale = tl.arange(0, ROW.padded_words), tl.arange(0, ROW.padded_scales)
    to = words_at(received.x + row * ROW.num_bytes, ROW.word)
    tl.store(to[:, None] + word[None, :], payload, mask=kept & (word < ROW.num_words)[None, :])
    if ROW.scale_words:
        to = words_at(received.scales + row * (4 * ROW.scale_words), 4)
        few = kept & (scale < ROW.scale_words)[None, :]
        tl.store(to[:, None] + scale[None, :], scales, mask=few)


@triton.jit
def _load_described(own, src, first, num_tokens, zone, call, ROW: tl.constexpr, G: tl.constexpr):
    """Which rows the tokens of a chunk are, and what each of them chose."""
    token, slot = first + tl.arange(0, ROW.chunk), tl.arange(0, ROW.padded_topk)
    real = (token < num_tokens)[:, None] & (slot < ROW.num_topk)[None, :]
    choice = (tl.cast(src * call.num_slots, tl.int64) + token)[:, None] * ROW.num_topk
    words = words_at(own + zone.choices, 4) + choice + slot[None, :]
    ids, weights = slot[None, :], slot[None, :]
    if ROW.num_topk:
        ids = tl.load(words, mask=real, other=-1)
    if ROW.has_weights:
        behind = G.size * call.num_slots * ROW.num_topk
        weights = tl.load(words + behind, mask=real, other=0)
    return _heads_of(own, src, token, num_tokens, zone, call), ids, weights


@triton.jit
def _describe_chunk(
    received,
    described,
    src,
    chunk,
    begin,
    limit,
    num_tokens,
    link,
    ROW: tl.constexpr,
    G: tl.constexpr,
):
    """Remember which tokens the rows of a chunk are, what they chose, and where they begin."""
    heads, ids, weights = described
    token, slot = chunk * ROW.chunk + tl.arange(0, ROW.chunk), tl.arange(0, ROW.padded_topk)
    kept = (heads >= 0) & (heads < limit)
    tl.store(words_at(received.src_idx, 4) + begin + heads, token, mask=kept)
    if ROW.num_topk:
        chosen = kept[:, None] & (slot < ROW.num_topk)[None, :]
        local = ids - link.rank * ROW.local
        here = (local >= 0) & (local < ROW.local)
        choice = (begin + heads)[:, None] * ROW.num_topk + slot[None, :]
        words = words_at(received.topk_idx, 8) + choice
        tl.store(words, tl.where(here, local, -1).to(tl.int64), mask=chosen)
        if ROW.has_weights:
            words = words_at(received.topk_weights, 4) + choice
            tl.store(words, tl.where(here, weights, 0), mask=chosen)
    UNITS: tl.constexpr = ROW.chunk // ROW.back
    heads = tl.reshape(heads, [UNITS, ROW.back])
    unit = chunk * UNITS + tl.arange(0, UNITS)
    there = unit * ROW.back < num_tokens
    words = words_at(received.chunks, 4) + ((1 + unit) * G.size + src) * 2
    tl.store(words, tl.min(tl.where(heads >= 0, heads, 0x7FFFFFFF), 1), mask=there)
    tl.store(words + 1, tl.sum((heads >= 0).to(tl.int32), 1), mask=there)


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
