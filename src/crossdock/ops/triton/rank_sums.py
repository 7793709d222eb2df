"""High-throughput combine in one kernel: rows are sent back, and added up.

Some programs send rows to the ranks they came from, in the order of that rank's tokens, of which a
few are covered by a flag; the others wait for a few of this rank's own tokens from all ranks, and
add up in rank order, in float32, with one rounding at the end. Rows of this rank's own tokens are
read where they are. Roles by ticket, senders first.

T tokens here, K top-k, R ranks, M slots for the tokens of a rank, N rows, H columns, C flags.

Example (2 ranks, H=1): the token of rank 0 went to both ranks, which return 10 and 20, and its bias
    is 1 -> rank 1 sends 20, rank 0 has 10, the token gets 31
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.ops.triton.links import heap_of, heaps_of, row_at, words_at
from crossdock.ops.triton.quantize import round_sum
from crossdock.ops.triton.rank_waits import add_wait
from crossdock.ops.triton.row_checks import check_sums, sums_of
from crossdock.ops.triton.signals import enter, post_credit, raise_flags, tagged
from crossdock.ops.triton.sync import (
    draw_ticket,
    time_tagged,
    wait_flags,
    wait_for_credit,
    wait_tagged,
)

__all__ = ["combine_ranks"]

KEPT = tl.constexpr(11)
CREDIT = tl.constexpr(12)
SUMS = tl.constexpr(13)


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
        granted = wait_for_credit(own, link.kind, number, link, CREDIT, G)
        last = words_at(rows.chunks, 4) + src * 2
        from_each = tl.load(last, mask=src < G.size, other=0)
        num_sent = tl.load(last + 1, mask=src < G.size, other=0)
        if granted & (ticket == 0):
            _tell_kept(from_each, rows, link, zone, call, number, G)
        begin = _begin_of(from_each, call, G)
        others = tl.where((src == link.rank) | (granted == 0), 0, num_sent)
        heaps = heaps_of(link, src, src < G.size)
        for chunk in range(ticket, tl.cdiv(tl.max(others), ROW.chunk), call.num_senders):
            UNITS: tl.constexpr = ROW.chunk // ROW.unit
            unit = chunk * UNITS + tl.arange(0, UNITS)
            there = (unit * ROW.unit)[None, :] < others[:, None]
            _send_chunk(rows, chunk, begin, there, link, zone, call, ROW, G)
            words = words_at(heaps + zone.flags, 4)[:, None] + unit[None, :]
            words += link.rank * call.num_flags
            raise_flags(words, there, number + (src[:, None] + unit[None, :]) * 0)
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
        nth = ticket - call.num_senders - TIMERS
        _reduce(own, rows, sums, kept, mine, nth, link, zone, call, number, ROW, G)


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
def _send_chunk(rows, chunk, begin, there, link, zone, call, ROW: tl.constexpr, G: tl.constexpr):
    """Send the rows of some of every other rank's tokens back to it, a few at a time."""
    peer, nth = tl.arange(0, G.padded), tl.arange(0, ROW.chunk // ROW.unit)
    unit = 1 + chunk * (ROW.chunk // ROW.unit) + nth
    words = words_at(rows.chunks, 4) + (unit[None, :] * G.size + peer[:, None]) * 2
    first = begin + tl.min(tl.load(words, mask=there, other=0x7FFFFFFF), 1)
    count = tl.sum(tl.load(words + 1, mask=there, other=0), 1)
    steps = tl.maximum(tl.cdiv(tl.minimum(tl.max(count), ROW.chunk), ROW.rows), 1)
    # The next rows are loaded before these are stored, so that neither waits for the other.
    payload, weights, token = _load_rows(rows, 0, steps, chunk, first, count, link, call, ROW, G)
    for step in range((G.size - 1) * steps):
        ahead, more, others = _load_rows(
            rows, step + 1, steps, chunk, first, count, link, call, ROW, G
        )
        base = heap_of(link, _peer_of(step, steps, chunk, link, G)) + zone.landing
        _store_rows(payload, weights, base, token, link, call, ROW)
        payload, weights, token = ahead, more, others


@triton.jit
def _store_rows(payload, weights, base, token, link, call, ROW: tl.constexpr):
    """Write a few rows to where those of some tokens land; -1 for none."""
    word, slot = tl.arange(0, ROW.padded_words), tl.arange(0, ROW.padded_topk)
    real = (token >= 0)[:, None]
    to = (link.rank * call.num_slots + token).to(tl.int64) * ROW.stride + base
    words = words_at(to, ROW.word)[:, None] + word[None, :]
    tl.store(words, payload, mask=real & (word < ROW.num_words)[None, :])
    if ROW.num_topk:
        words = words_at(to + ROW.weights_at, 4)[:, None] + slot[None, :]
        tl.store(words, weights, mask=real & (slot < ROW.num_topk)[None, :])
    if ROW.checked:
        sums = sums_of(tl.where(real & (word < ROW.num_words)[None, :], payload, 0))
        tl.store(words_at(to + ROW.check_at, 8), sums, mask=token >= 0)


@triton.jit
def _peer_of(step, steps, chunk, link, G: tl.constexpr):
    """Whose rows a step is about: neither all ranks nor all programs write to the same one."""
    PEERS: tl.constexpr = max(G.size - 1, 1)
    return (link.rank + 1 + (step // steps + chunk) % PEERS) % G.size


@triton.jit
def _load_rows(
    rows, step, steps, chunk, first, count, link, call, ROW: tl.constexpr, G: tl.constexpr
):
    """A few rows, one rank after another; their weights; and which tokens they are, -1 for none."""
    peer = tl.arange(0, G.padded)
    dst = _peer_of(step, steps, chunk, link, G)
    is_dst = (peer == dst) & (step < (G.size - 1) * steps)
    nth = step % steps * ROW.rows + tl.arange(0, ROW.rows)
    row = tl.sum(tl.where(is_dst, first, 0)) + nth
    real = (nth < tl.sum(tl.where(is_dst, count, 0))) & (row < call.num_rows)
    word, slot = tl.arange(0, ROW.padded_words), tl.arange(0, ROW.padded_topk)
    at = words_at(rows.x + row.to(tl.int64) * ROW.num_bytes, ROW.word)[:, None] + word[None, :]
    payload = tl.load(at, mask=real[:, None] & (word < ROW.num_words)[None, :])
    token = tl.load(words_at(rows.src_idx, 4) + row, mask=real, other=-1)
    token = tl.where(token < call.num_slots, token, -1)  # of a dispatch that failed, maybe
    weights = tl.zeros([ROW.rows, ROW.padded_topk], tl.int32)
    if ROW.num_topk:
        at = words_at(rows.topk_weights, 4) + row[:, None] * ROW.num_topk + slot[None, :]
        weights = tl.load(at, mask=real[:, None] & (slot < ROW.num_topk)[None, :], other=0)
    return payload, weights, token


@triton.jit
def _time(own, sums, src, link, zone, call, number, ROW: tl.constexpr, G: tl.constexpr):
    """Measure how long the rows of a rank are waited for."""
    first = tl.arange(0, 1) == 0
    words = words_at(own + zone.kept, 8) + src + tl.arange(0, 1)
    _, spent = time_tagged(words, first, first * 0 + src, number, link, KEPT, G)
    flags = own + zone.flags + 4 * src * call.num_flags
    num_flags = tl.where(src == link.rank, 0, tl.cdiv(call.num_tokens, ROW.unit))
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
    own, rows, sums, kept, mine, nth, link, zone, call, number, ROW: tl.constexpr, G: tl.constexpr
):
    """Add up every so many chunks of this rank's tokens, part by part.

    A part is what some ranks have for a few tokens. The next one is loaded before one is added.
    """
    STEPS: tl.constexpr = ROW.parts * (ROW.chunk // ROW.sums)
    num_chunks = tl.cdiv(tl.cdiv(call.num_tokens, ROW.chunk) - nth, call.num_reducers)
    end = (nth + (num_chunks - 1) * call.num_reducers + 1) * ROW.chunk
    missing = tl.maximum(end - call.num_tokens, 0) // ROW.sums  # of the last chunk
    _await(own, nth, link, zone, call, number, ROW, G)
    heads = _load_heads(sums, kept, 0, nth, call, ROW, G)
    terms = _load_terms(own, rows, heads, mine, 0, nth, link, zone, call, number, ROW, G)
    heads = _load_heads(sums, kept, 1, nth, call, ROW, G)
    total = tl.zeros([ROW.sums, ROW.padded], tl.float32)
    weights = tl.zeros([ROW.sums, ROW.padded_topk], tl.float32)
    for step in range(num_chunks * STEPS - missing * ROW.parts):
        if (step + 1) % STEPS == 0:
            chunk = nth + (step + 1) // STEPS * call.num_reducers
            _await(own, chunk, link, zone, call, number, ROW, G)
        ahead = _load_terms(own, rows, heads, mine, step + 1, nth, link, zone, call, number, ROW, G)
        heads = _load_heads(sums, kept, step + 2, nth, call, ROW, G)
        total, weights = _add(total, weights, terms, step, ROW)
        if (step + 1) % ROW.parts == 0:
            _store_sums(sums, total, weights, step, nth, call, ROW, G)
        terms = ahead


@triton.jit
def _part_of(step, nth, call, ROW: tl.constexpr):
    """The tokens, and the first of the ranks, that a step of a program is about."""
    STEPS: tl.constexpr = ROW.parts * (ROW.chunk // ROW.sums)
    chunk, inside = nth + step // STEPS * call.num_reducers, step % STEPS
    token = chunk * ROW.chunk + inside // ROW.parts * ROW.sums + tl.arange(0, ROW.sums)
    return token, inside % ROW.parts * ROW.terms


@triton.jit
def _await(own, chunk, link, zone, call, number, ROW: tl.constexpr, G: tl.constexpr):
    """Wait for the rows of a chunk of this rank's tokens, from all ranks."""
    src = tl.arange(0, G.padded)[:, None]
    unit = chunk * (ROW.chunk // ROW.unit) + tl.arange(0, ROW.chunk // ROW.unit)[None, :]
    flags = words_at(own + zone.flags, 4) + src * call.num_flags + unit
    there = (src < G.size) & (src != link.rank) & (unit * ROW.unit < call.num_tokens)
    wait_flags(flags, there, src + unit * 0, number, link, SUMS, G, 0)


@triton.jit
def _load_heads(sums, kept, step, nth, call, ROW: tl.constexpr, G: tl.constexpr):
    """Which of the rows that ranks have are those of a few tokens, -1 for none."""
    token, rank = _part_of(step, nth, call, ROW)
    src = tl.arange(0, G.padded)
    heads = ()
    TERMS: tl.constexpr = ROW.terms
    for each in tl.static_range(TERMS):
        r = rank + each
        words = words_at(sums.send_head, 4) + token * G.size + r
        head = tl.load(words, mask=(token < call.num_tokens) & (r < G.size), other=-1)
        heads = heads + (tl.where(head < tl.sum(tl.where(src == r, kept, 0)), head, -1),)
    return heads


@triton.jit
def _sums_of(term, ROW: tl.constexpr):
    """The sums of rows that have been loaded, zeros behind them."""
    WORD: tl.constexpr = tl.int32 if ROW.element == tl.float32 else tl.int16
    return sums_of(term.to(WORD, bitcast=True))


@triton.jit
def _load_terms(
    own,
    rows,
    heads,
    mine,
    step,
    nth,
    link,
    zone,
    call,
    number,
    ROW: tl.constexpr,
    G: tl.constexpr,
):
    """What ranks have for a few tokens, zeros if nothing, and the weights of each."""
    token, rank = _part_of(step, nth, call, ROW)
    lane, slot = tl.arange(0, ROW.padded), tl.arange(0, ROW.padded_topk)
    terms = ()
    TERMS: tl.constexpr = ROW.terms
    for each in tl.static_range(TERMS):
        r = rank + each
        landed = (r * call.num_slots + token).to(tl.int64) * ROW.stride + (own + zone.landing)
        row = (mine + heads[each]).to(tl.int64)
        at = tl.where(r == link.rank, rows.x + row * ROW.num_bytes, landed)
        there = (heads[each] >= 0)[:, None]
        words = _elements_at(at, ROW)[:, None] + lane[None, :]
        term = tl.load(words, mask=there & (lane < ROW.hidden)[None, :], other=0.0)
        if ROW.checked & (r != link.rank):
            told = tl.load(words_at(landed + ROW.check_at, 8), mask=heads[each] >= 0, other=0)
            check_sums(_sums_of(term, ROW), told, heads[each] >= 0, r, number, link, G)
        weights = slot[None, :]
        if ROW.num_topk:
            own_weights = rows.topk_weights + row * (4 * ROW.num_topk)
            at = tl.where(r == link.rank, own_weights, landed + ROW.weights_at)
            words = words_at(at, 4)[:, None] + slot[None, :]
            weights = tl.load(words, mask=there & (slot < ROW.num_topk)[None, :], other=0)
        terms = terms + ((term, weights),)
    return terms


@triton.jit
def _add(total, weights, terms, step, ROW: tl.constexpr):
    """Add a part to those of other ranks before, in rank order."""
    total = tl.where(step % ROW.parts == 0, 0.0, total)
    weights = tl.where(step % ROW.parts == 0, 0.0, weights)
    TERMS: tl.constexpr = ROW.terms
    for each in tl.static_range(TERMS):
        term, bits = terms[each]
        total += term.to(tl.float32)
        if ROW.num_topk:
            weights += bits.to(tl.float32, bitcast=True)
    return total, weights


@triton.jit
def _store_sums(sums, total, weights, step, nth, call, ROW: tl.constexpr, G: tl.constexpr):
    """Add the biases to the sums of a few tokens, round once, and write them."""
    token, _ = _part_of(step, nth, call, ROW)
    lane, slot = tl.arange(0, ROW.padded), tl.arange(0, ROW.padded_topk)
    cells = (token < call.num_tokens)[:, None] & (lane < ROW.hidden)[None, :]
    at = token.to(tl.int64) * ROW.num_bytes
    if ROW.num_bias > 0:
        words = _elements_at(sums.bias + at, ROW)[:, None] + lane[None, :]
        total += tl.load(words, mask=cells, other=0.0).to(tl.float32)
    if ROW.num_bias > 1:
        words = _elements_at(sums.more_bias + at, ROW)[:, None] + lane[None, :]
        total += tl.load(words, mask=cells, other=0.0).to(tl.float32)
    words = _elements_at(sums.out + at, ROW)[:, None] + lane[None, :]
    tl.store(words, round_sum(total, ROW.element, G.is_compiled), mask=cells)
    if ROW.num_topk:
        few = (token < call.num_tokens)[:, None] & (slot < ROW.num_topk)[None, :]
        to = words_at(sums.topk_weights, 4) + token[:, None] * ROW.num_topk + slot[None, :]
        tl.store(to, weights.to(tl.int32, bitcast=True), mask=few)
