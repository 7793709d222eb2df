"""High-throughput dispatch: rows are sent, while `rank_places` places those that come.

A row is written once to every rank that wants it. Where to follows from (source, token) alone, so
nobody waits for the counts of others: while rows travel, `rank_routes` learns them. A few tokens at
a time are covered by one flag, and with them goes what they chose, the same for all ranks. Which of
the rows for a rank each token is, that rank is told by the first programs.

Where the caller takes rows as they lie (*views*), those of a source land one after another, this
rank's own among them, so that they have to be numbered first.

T tokens here, K top-k, R ranks.

Example (2 ranks, H=1): rank 0 has x=[[10],[20]], of which both go to rank 1 and the first to rank
    0, rank 1 has x=[[30]], for itself -> send_head of rank 0 [[0,0],[-1,1]]; in rank 1 10 and 20
    land in the first two slots for rank 0
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.ops.triton.links import heap_of, heaps_of, words_at
from crossdock.ops.triton.row_checks import sums_of
from crossdock.ops.triton.signals import enter, post_credit, raise_flags
from crossdock.ops.triton.sync import draw_ticket, wait_flags, wait_for_credit

__all__ = ["send_ranks"]

CREDIT = tl.constexpr(8)
NUMBERED = tl.constexpr(15)
AT_ONCE = tl.constexpr(1024)
"""Tokens that are numbered together."""


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
    """Send this rank's rows, chunk by chunk; `NUMBERS`: they have to be numbered.

    They are, by a program for each rank, while rows of others are sent already. Those of views
    cannot be sent before.
    """
    ticket, number = draw_ticket(link, G.size + call.num_programs)
    own = heap_of(link, link.rank)
    if ticket == 0:
        enter(link, number, G)
        post_credit(link, CREDITED, number - 1, G)
    granted = wait_for_credit(own, CREDITED, number, link, CREDIT, G)
    if granted & (ticket < G.size):
        _number_rows(own, sent, ticket, link, zone, call, number, NUMBERS, G)
    elif granted:
        peer = tl.arange(0, G.padded)
        if ROW.viewed:
            known = words_at(own + zone.numbered, 4) + G.size + peer
            wait_flags(known, peer < G.size, peer * 0 + link.rank, number, link, NUMBERED, G, 0)
        _send(sent, ticket - G.size, link, zone, call, number, ROW, G)


@triton.jit
def _send(sent, nth, link, zone, call, number, ROW: tl.constexpr, G: tl.constexpr):
    """Send every so many chunks."""
    peer = tl.arange(0, G.padded)
    heaps = heaps_of(link, peer, peer < G.size)
    CHUNK: tl.constexpr = ROW.chunk
    # The next rows are loaded before these are stored: loads do not overtake stores.
    rows = _load_rows(sent, nth * CHUNK, link, call, ROW, G)
    for chunk in range(nth, tl.cdiv(call.num_tokens, CHUNK), call.num_programs):
        following = chunk + call.num_programs
        ids, weights = _load_choices(sent, chunk, call, ROW)
        for begin in range(chunk * CHUNK, chunk * CHUNK + CHUNK, ROW.rows):
            then = begin + ROW.rows
            then = tl.where(then % CHUNK == 0, following * CHUNK, then)
            ahead = _load_rows(sent, then, link, call, ROW, G)
            _store_rows(rows, begin, link, zone, call, ROW, G)
            rows = ahead
        _send_choices(ids, weights, chunk, link, zone, call, ROW, G)
        UNITS: tl.constexpr = CHUNK // ROW.unit
        unit = chunk * UNITS + tl.arange(0, UNITS)
        words = words_at(heaps + zone.flags, 4)[:, None] + unit[None, :]
        there = (peer < G.size)[:, None] & (unit * ROW.unit < call.num_tokens)[None, :]
        numbers = number + (peer[:, None] + unit[None, :]) * 0
        raise_flags(words + link.rank * call.num_flags, there, numbers)


@triton.jit
def _number_rows(own, sent, dst, link, zone, call, number, NUMBERS: tl.constexpr, G: tl.constexpr):
    """Tell a rank which of the rows for it each token is, and this one that it is known."""
    base = heap_of(link, dst)
    theirs = words_at(base + zone.heads, 4) + tl.cast(link.rank * call.num_slots, tl.int64)
    total = dst * 0
    for begin in range(0, call.num_tokens, AT_ONCE):
        token = begin + tl.arange(0, AT_ONCE)
        real = token < call.num_tokens
        heads = words_at(sent.send_head, 4) + token * G.size + dst
        if NUMBERS:
            goes = _goes(sent, token, dst, call, G)
            count = tl.cumsum(goes.to(tl.int32), 0)
            head = tl.where(goes, total + count - 1, -1)
            tl.store(heads, head, mask=real)
            total += tl.max(count)
        else:
            head = tl.load(heads, mask=real, other=-1)
        tl.store(theirs + token, head, mask=real)
    place = tl.arange(0, 2)
    words = tl.where(place == 0, base + 4 * link.rank, own + 4 * (G.size + dst)) + zone.numbered
    raise_flags(words_at(words, 4), place >= 0, place * 0 + number)


@triton.jit
def _goes(sent, token, dst, call, G: tl.constexpr):
    """Which tokens go to a rank."""
    words = words_at(sent.is_token_in_rank, 1) + token * G.size + dst
    return tl.load(words, mask=token < call.num_tokens, other=0) != 0


@triton.jit
def _dst_of(step, begin, link, ROW: tl.constexpr, G: tl.constexpr):
    """Neither all ranks nor all programs of one write to the same rank at a time."""
    NUM_DST: tl.constexpr = G.size if ROW.viewed else G.size - 1
    return (link.rank + 1 + (begin // ROW.chunk + step) % NUM_DST) % G.size


@triton.jit
def _load_rows(sent, begin, link, call, ROW: tl.constexpr, G: tl.constexpr):
    """A few rows, their scales, and in which slot of each rank in turn they land, -1 for none."""
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
    slots = ()
    NUM_DST: tl.constexpr = G.size if ROW.viewed else G.size - 1
    for step in tl.static_range(NUM_DST):
        dst = _dst_of(step, begin, link, ROW, G)
        if ROW.viewed:
            words = words_at(sent.send_head, 4) + token * G.size + dst
            slot = tl.load(words, mask=real, other=-1)
            # Where numbering failed, anything may stand there.
            slots = slots + (tl.where(slot < call.num_slots, slot, -1),)
        else:
            slots = slots + (tl.where(_goes(sent, token, dst, call, G), token, -1),)
    return payload, scales, slots


@triton.jit
def _store_rows(rows, begin, link, zone, call, ROW: tl.constexpr, G: tl.constexpr):
    """Write a few rows to the ranks that want them."""
    payload, scales, slots = rows
    word, scale = tl.arange(0, ROW.padded_words), tl.arange(0, ROW.padded_scales)
    NUM_DST: tl.constexpr = G.size if ROW.viewed else G.size - 1
    heaps = ()
    for step in tl.static_range(NUM_DST):
        heaps = heaps + (heap_of(link, _dst_of(step, begin, link, ROW, G)),)
    for step in tl.static_range(NUM_DST):
        goes = (slots[step] >= 0)[:, None]
        to = (link.rank * call.num_slots + slots[step]).to(tl.int64) * ROW.stride
        to += heaps[step] + zone.landing
        words = words_at(to, ROW.word)[:, None] + word[None, :]
        tl.store(words, payload, mask=goes & (word < ROW.num_words)[None, :])
        if ROW.scale_words:
            words = words_at(to + ROW.scales_at, 4)[:, None] + scale[None, :]
            tl.store(words, scales, mask=goes & (scale < ROW.scale_words)[None, :])
        if ROW.checked:
            sums = sums_of(tl.where(goes & (word < ROW.num_words)[None, :], payload, 0))
            tl.store(words_at(to + ROW.check_at, 8), sums, mask=slots[step] >= 0)


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
def _send_choices(ids, weights, chunk, link, zone, call, ROW: tl.constexpr, G: tl.constexpr):
    """Tell all ranks, this one too, what a chunk's tokens chose."""
    nth = tl.arange(0, ROW.chunk * ROW.padded_topk)
    choice = chunk * (ROW.chunk * ROW.num_topk) + nth
    chosen = (nth < ROW.chunk * ROW.num_topk) & (choice < call.num_tokens * ROW.num_topk)
    choice += tl.cast(link.rank * call.num_slots, tl.int64) * ROW.num_topk
    SIZE: tl.constexpr = G.size
    heaps = ()
    for dst in tl.static_range(SIZE):
        heaps = heaps + (heap_of(link, dst),)
    for dst in tl.static_range(SIZE):
        words = words_at(heaps[dst] + zone.choices, 4) + choice
        if ROW.num_topk:
            tl.store(words, ids, mask=chosen)
        if ROW.has_weights:
            tl.store(words + SIZE * call.num_slots * ROW.num_topk, weights, mask=chosen)
