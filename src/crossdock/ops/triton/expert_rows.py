"""Low-latency dispatch in one kernel: rows are sent (`expert_sends`), and placed by expert.

A row crosses once per (token, rank). Its place follows from three numbers: how many rows its expert
gets from lower ranks (every rank tells the others, tagged, how many it has for each of their
experts), how many of earlier tokens of its own rank (the sender counts them and sends the number
with the row), and where the expert's rows begin. So a row is placed as soon as it has come.

Roles, by ticket: one program tells which rounds are over, one the counts, some send, one lays out,
the others place. Launched with as many programs as tell and send, the kernel does its first half,
and the next launch goes on: that is how a hook receives.

T tokens here, K top-k, R ranks, L local experts, M slots for the tokens of a rank, H columns.

Example (2 ranks, 1 expert each, H=1, M=2): rank 0 has x=[[10],[20]], topk_idx=[[0],[1]], rank 1 has
    x=[[30]], topk_idx=[[0]] -> slab of rank 0: 10 (token 0 of rank 0), 30 (token 0 of rank 1), so
    recv_count [2]; slab of rank 1: 20
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.ops.triton.choices import count_choices
from crossdock.ops.triton.expert_sends import CREDIT, send_row
from crossdock.ops.triton.links import heap_of, heaps_of, words_at
from crossdock.ops.triton.masked import is_counted_on, is_left_out, is_masked, mask_ranks
from crossdock.ops.triton.pieces import load_pieces, num_pieces, store_piece
from crossdock.ops.triton.row_checks import check_sum, sum_of_pieces
from crossdock.ops.triton.signals import enter, post_rounds, tagged
from crossdock.ops.triton.sync import (
    draw_ticket,
    follow,
    read_flags,
    read_tagged,
    time_flags,
    time_tagged,
    wait_flags,
    wait_for_credit,
    wait_here,
    wait_singled,
    wait_tagged,
)

__all__ = ["agree", "counted", "dispatch_experts", "tell_tokens", "time_rows"]

COUNTS = tl.constexpr(1)
ROWS = tl.constexpr(2)


@triton.jit
def dispatch_experts(
    tokens,
    slabs,
    link,
    zone,
    call,
    ROW: tl.constexpr,
    E: tl.constexpr,
    G: tl.constexpr,
):
    """Send this rank's rows, and place those that come; see the module."""
    TIMERS: tl.constexpr = G.size if E.counts_waits else 0
    follow(G)
    own = heap_of(link, link.rank)
    ticket, number = draw_ticket(link, 3 + TIMERS + call.num_senders + call.num_placers)
    takes_part = tl.cast(1, tl.int1)
    if G.can_shrink:
        takes_part = is_left_out(link) == 0
    if ticket == 0:
        if takes_part:
            enter(link, number, G)
            post_rounds(link, number, DISPATCHES=True, LEAVES=False, G=G)
    elif ticket == 1:
        if wait_for_credit(own, link.kind, number, link, CREDIT, G) & takes_part:
            _tell(tokens.topk_idx, link, zone, call, number, E, G)
    elif ticket < call.num_senders + 2:
        num_tokens, granted = call.num_tokens * takes_part.to(tl.int32), tl.cast(0, tl.int1)
        for token in range(ticket - 2, num_tokens, call.num_senders):
            granted = send_row(own, tokens, token, link, zone, call, number, granted, ROW, E, G)
    elif ticket == call.num_senders + 2:
        _lay_out(own, slabs, link, zone, call, number, E, G)
    elif ticket < call.num_senders + 3 + TIMERS:
        time_rows(own, slabs, ticket - call.num_senders - 3, link, zone, call, number, E, G)
    else:
        peer = tl.arange(0, G.padded)
        there = (1 << G.size) - 1
        if G.can_shrink:
            there = wait_here(words_at(own + zone.told, 8) + 2 * G.size, number, link, G)
        words = words_at(own + zone.told, 8) + 2 * peer
        wanted = (peer < G.size) & (((there >> peer) & 1) != 0)
        num_sent = counted(words, wanted, peer, number, link, G)
        num_items = G.size * tl.minimum(tl.max(num_sent), call.num_slots)
        first = ticket - call.num_senders - 3 - TIMERS
        for item in range(first, num_items, call.num_placers):
            src = (link.rank + item) % G.size
            if item // G.size < tl.sum(tl.where(peer == src, num_sent, 0)):
                token = item // G.size
                _place(own, slabs, src, token, there, link, zone, call, number, ROW, E, G)


@triton.jit
def tell_tokens(link, zone, call, number, G: tl.constexpr):
    """Tell every rank how many tokens there are here, and this one's masks, which all take over."""
    peer = tl.arange(0, G.padded)
    base = heaps_of(link, peer, peer < G.size)
    words = words_at(base + zone.told, 8) + 2 * link.rank
    tl.store(words, tagged(peer * 0 + call.num_tokens, number), mask=peer < G.size)
    if G.can_shrink:
        bits = tl.sum(tl.where(is_masked(link, peer, peer < G.size), 1 << peer, 0))
        tl.store(words + 1, tagged(peer * 0 + bits, number), mask=peer < G.size)


@triton.jit
def _tell(topk_idx, link, zone, call, number, E: tl.constexpr, G: tl.constexpr):
    """Tell every rank this, and how many rows there are for each of its experts."""
    tell_tokens(link, zone, call, number, G)
    expert = tl.arange(0, E.bins)
    real = expert < G.size * E.local
    base = heaps_of(link, expert // E.local, real)
    words = words_at(base + zone.counts, 8) + link.rank * E.local + expert % E.local
    tl.store(words, tagged(count_choices(topk_idx, call.num_tokens, E), number), mask=real)


@triton.jit
def counted(words, wanted, ranks, number, link, G: tl.constexpr):
    """Counts of ranks; where some may be lost, of those that are known to have come."""
    if G.can_shrink:
        counts = read_tagged(words, wanted)
    else:
        counts = wait_tagged(words, wanted, ranks, number, link, COUNTS, G)
    return counts


@triton.jit
def _lay_out(own, slabs, link, zone, call, number, E: tl.constexpr, G: tl.constexpr):
    """Say which rows each expert gets from each rank, and how many in all."""
    expert, src = tl.arange(0, E.padded_local), tl.arange(0, G.padded)
    words = words_at(own + zone.counts, 8) + src[:, None] * E.local + expert[None, :]
    real = (src[:, None] < G.size) & (expert[None, :] < E.local)
    ranks = src[:, None] + expert[None, :] * 0
    if G.can_shrink:
        there = agree(own, link, zone, call, number, E, G)
        real = real & there[:, None]
    counts = counted(words, real, ranks, number, link, G)
    real = (src[:, None] < G.size) & (expert[None, :] < E.local)
    begin = tl.cumsum(counts, 0) - counts
    words = words_at(slabs.layout_range, 8) + expert[None, :] * G.size + src[:, None]
    tl.store(words, (begin.to(tl.int64) << 32) | counts.to(tl.int64), mask=real)
    total = tl.sum(counts, 0)
    tl.store(words_at(slabs.recv_count, 4) + expert, total, mask=expert < E.local)
    if E.counts_rows:
        received = words_at(slabs.received, 4) + expert
        before = tl.load(received, mask=expert < E.local, other=0)
        tl.store(received, before + total, mask=expert < E.local)
    words = words_at(own + zone.told, 8) + 2 * src
    num_sent = counted(words, src < G.size, src, number, link, G)
    if G.can_shrink:
        num_sent = tl.where(there, num_sent, -1)
    tl.store(words_at(slabs.src_info, 4) + slabs.num_sent + src, num_sent, mask=src < G.size)


@triton.jit
def agree(own, link, zone, call, number, E: tl.constexpr, G: tl.constexpr):
    """Take over the masks of all ranks, wait for the rows of the others, and say whose count.

    Rows are placed after that alone: who is lost while they arrive must leave no gaps.
    """
    peer = tl.arange(0, G.padded)
    words = words_at(own + zone.told, 8) + 2 * peer
    num_sent = wait_tagged(words, peer < G.size, peer, number, link, COUNTS, G)
    bits = wait_tagged(words + 1, peer < G.size, peer, number, link, COUNTS, G)
    masked = tl.max((bits[:, None] >> peer[None, :]) & 1, 0) != 0
    mask_ranks(masked & (peer < G.size), link, G)
    tl.debug_barrier()
    if not E.viewed:
        expert = tl.arange(0, E.padded_local)
        counts = words_at(own + zone.counts, 8) + peer[:, None] * E.local + expert[None, :]
        real = (peer[:, None] < G.size) & (expert[None, :] < E.local)
        wait_tagged(counts, real, peer[:, None] + expert[None, :] * 0, number, link, COUNTS, G)
    SIZE: tl.constexpr = G.size
    for src in tl.static_range(SIZE):
        num = tl.minimum(tl.sum(tl.where(peer == src, num_sent, 0)), call.num_slots)
        for begin in range(0, num, E.tokens):
            token = begin + tl.arange(0, E.tokens)
            flags = words_at(own + zone.flags, 4) + src * call.num_slots + token
            wait_flags(flags, token < num, token * 0 + src, number, link, ROWS, G, 1)
    there = is_counted_on(link, peer, G) & (peer < G.size)
    word = words_at(own + zone.told, 8) + 2 * G.size
    tl.store(word, tagged(tl.sum(tl.where(there, 1 << peer, 0)), number))
    return there


@triton.jit
def time_rows(own, slabs, src, link, zone, call, number, E: tl.constexpr, G: tl.constexpr):
    """Measure how long the rows of a rank are waited for."""
    told = words_at(own + zone.told, 8) + 2 * src + tl.arange(0, 1)
    first = tl.arange(0, 1) == 0
    data, spent = time_tagged(told, first, first * 0 + src, number, link, COUNTS, G)
    num_sent = tl.max(data)
    for begin in range(0, tl.minimum(num_sent, call.num_slots), E.tokens):
        token = begin + tl.arange(0, E.tokens)
        words = words_at(own + zone.flags, 4) + src * call.num_slots + token
        ranks = token * 0 + src
        spent += time_flags(words, token < num_sent, ranks, number, link, ROWS, G, 1)
    waits = words_at(slabs.waits, 8) + src
    tl.store(waits, tl.load(waits) + spent)


@triton.jit
def _place(
    own,
    slabs,
    src,
    token,
    there,
    link,
    zone,
    call,
    number,
    ROW: tl.constexpr,
    E: tl.constexpr,
    G: tl.constexpr,
):
    """Copy one row to the experts that it is for, if it is for some here, and remember where."""
    slot = tl.arange(0, E.padded_topk)
    item = src * call.num_slots + token
    words = words_at(own + zone.flags, 4) + item + slot * 0
    if G.can_shrink:
        flag = read_flags(words, slot == 0)
    else:
        flag = wait_flags(words, slot == 0, slot * 0 + src, number, link, ROWS, G, 1)
    to = words_at(slabs.src_info, 4) + slabs.row_of + item * E.num_topk + slot
    if tl.sum(flag) == number * 2 + 1:
        at = own + zone.landing + tl.cast(item, tl.int64) * ROW.stride
        # On its way while its places are worked out.
        payload, scales = _load_landed(at, ROW)
        if ROW.checked:
            told = tl.load(words_at(at + ROW.check_at, 8))
            found = sum_of_pieces(payload, ROW.num_words, ROW.words)
            check_sum(found, told, src, number, link, G)
        choices = tl.load(
            words_at(at + ROW.choices_at, 8) + slot, mask=slot < E.num_topk, other=0x7FFFFFFF
        )
        local = (choices & 0x7FFFFFFF).to(tl.int32) - link.rank * E.local
        is_here = (slot < E.num_topk) & (local >= 0) & (local < E.local)
        begin = _begin_of(own, local, is_here, src, there, link, zone, call, number, E, G)
        rows = begin + (choices >> 32).to(tl.int32)
        limit = call.num_slots * (G.size * (min(E.num_topk, E.local) if E.compact else E.local))
        is_here = is_here & (rows >= 0) & (rows < limit)
        tl.store(to, tl.where(is_here, rows, -1), mask=slot < E.num_topk)
        tl.store(words_at(slabs.src_info, 4) + rows, token + slot * 0, mask=is_here)
        if E.has_weights:
            words = words_at(at + ROW.choices_at + 8 * E.num_topk, 4) + slot
            weights = tl.load(words, mask=is_here, other=0)
            words = words_at(slabs.src_info, 4) + slabs.weights + item * E.num_topk + slot
            tl.store(words, weights, mask=is_here)
        _store_placed(slabs, payload, scales, tl.where(is_here, rows, -1), call, ROW, E, G)
    else:
        tl.store(to, slot * 0 - 1, mask=slot < E.num_topk)


@triton.jit
def _begin_of(
    own, local, is_here, src, there, link, zone, call, number, E: tl.constexpr, G: tl.constexpr
):
    """The first row that each of these experts has of a rank: [K] int32."""
    rank = tl.arange(0, G.padded)[:, None]
    counts = (rank < G.size) & (((there >> rank) & 1) != 0)
    words = words_at(own + zone.counts, 8) + rank * E.local
    if E.compact:
        expert = tl.arange(0, E.padded_local)[None, :]
        wanted, ranks = counts & (expert < E.local), rank + expert * 0
        found = counted(words + expert, wanted, ranks, number, link, G)
        total, lower = tl.sum(found, 0), tl.sum(tl.where(rank < src, found, 0), 0)
        same = tl.where(expert == local[:, None], lower[None, :], 0)
        return tl.sum(tl.where(expert < local[:, None], total[None, :], same), 1)
    else:
        wanted, ranks = counts & (rank < src) & is_here[None, :], rank + local[None, :] * 0
        if G.can_shrink:
            found = read_tagged(words + local[None, :], wanted)
        else:
            found, _ = wait_singled(words + local[None, :], wanted, ranks, number, link, COUNTS, G)
        return tl.sum(found, 0) + local * (G.size * call.num_slots)


@triton.jit
def _load_landed(at, ROW: tl.constexpr):
    """Payload and scales of a row that has landed."""
    scale = tl.arange(0, ROW.padded_scales)
    payload = load_pieces(words_at(at, ROW.word), ROW.num_words, ROW.words)
    scales = tl.zeros([ROW.padded_scales], tl.int32)
    if ROW.num_scales:
        words = words_at(at + ROW.scales_at, 4) + scale
        scales = tl.load(words, mask=scale < ROW.num_scales)
    return payload, scales


@triton.jit
def _store_placed(
    slabs, payload, scales, rows, call, ROW: tl.constexpr, E: tl.constexpr, G: tl.constexpr
):
    """Write a row to the rows of the slabs that are not -1, to each once."""
    slot = tl.arange(0, E.padded_topk)
    scale = tl.arange(0, ROW.padded_scales)
    NUM: tl.constexpr = num_pieces(ROW.num_words, ROW.words)
    is_same = (rows[:, None] == rows[None, :]) & (slot[None, :] < slot[:, None])
    is_first = (rows >= 0) & (tl.max(is_same.to(tl.int32), 1) == 0)
    nth = tl.cumsum(is_first.to(tl.int32), 0)
    for n in range(1, tl.max(nth) + 1):
        row = tl.sum(tl.where(is_first & (nth == n), rows, 0))
        to = words_at(slabs.payload + row.to(tl.int64) * ROW.num_bytes, ROW.word)
        for piece in tl.static_range(NUM):
            store_piece(to, piece, payload[piece], True, ROW.num_words, ROW.words)
        if ROW.num_scales:
            slab_rows = G.size * call.num_slots
            begin = row.to(tl.int64) * slabs.scale_row
            if not E.compact:
                begin = (row // slab_rows).to(tl.int64) * slabs.scale_expert
                begin += (row % slab_rows) * slabs.scale_row
            words = words_at(slabs.scales + 4 * begin, 4) + scale.to(tl.int64) * slabs.scale_column
            tl.store(words, scales, mask=scale < ROW.num_scales)
