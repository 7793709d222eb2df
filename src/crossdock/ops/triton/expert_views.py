"""Low-latency rows that stay where they land: a slot for each token of every rank.

Dispatch sends as `expert_rows` does, and notes which slots have rows, and what their tokens chose.
Combine brings back one row for each token and rank, which the caller has added up over the experts
there. Either it is sent, or, where the caller has written it to this rank's heap, the rank whose
token it is reads it there.

T tokens here, K top-k, R ranks, L local experts, M slots for the tokens of a rank.

Example (2 ranks, an expert each, M=2): rank 0 has two tokens, which choose expert 1 and both ->
    src_idx of rank 0 [[-1,1],[-1,-1]], of rank 1 [[0,1],[-1,-1]]
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.ops.triton.expert_rows import agree, counted, tell_tokens, time_rows
from crossdock.ops.triton.expert_sends import send_row
from crossdock.ops.triton.expert_sums import add_up, row_of_x, store_sum, time_sums
from crossdock.ops.triton.links import heap_of, heaps_of, words_at
from crossdock.ops.triton.masked import is_left_out
from crossdock.ops.triton.pieces import load_pieces
from crossdock.ops.triton.quantize import round_sum
from crossdock.ops.triton.row_checks import check_sum, sum_of_pieces
from crossdock.ops.triton.signals import enter, post_rounds, raise_flags
from crossdock.ops.triton.sync import (
    draw_ticket,
    follow,
    has_credit,
    look_for_credit,
    read_flags,
    time_flags,
    wait_flags,
    wait_for_credit,
    wait_here,
)

__all__ = ["leave_experts", "return_experts"]

ROWS = tl.constexpr(2)
CREDIT = tl.constexpr(3)
SUMS = tl.constexpr(5)
BACK_CREDIT = tl.constexpr(6)


@triton.jit
def leave_experts(
    tokens,
    views,
    link,
    zone,
    call,
    ROW: tl.constexpr,
    E: tl.constexpr,
    AT_ONCE: tl.constexpr,
    G: tl.constexpr,
):
    """Send this rank's rows, and note those that come, a few slots at once; see the module."""
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
            post_rounds(link, number, DISPATCHES=True, LEAVES=True, G=G)
    elif ticket == 1:
        if wait_for_credit(own, link.kind, number, link, CREDIT, G) & takes_part:
            tell_tokens(link, zone, call, number, G)
    elif ticket < call.num_senders + 2:
        num_tokens, granted = call.num_tokens * takes_part.to(tl.int32), tl.cast(0, tl.int1)
        for token in range(ticket - 2, num_tokens, call.num_senders):
            granted = send_row(own, tokens, token, link, zone, call, number, granted, ROW, E, G)
    elif ticket == call.num_senders + 2:
        _note_ranks(own, views, link, zone, call, number, E, G)
    elif ticket < call.num_senders + 3 + TIMERS:
        time_rows(own, views, ticket - call.num_senders - 3, link, zone, call, number, E, G)
    else:
        peer = tl.arange(0, G.padded)
        there = (1 << G.size) - 1
        if G.can_shrink:
            there = wait_here(words_at(own + zone.told, 8) + 2 * G.size, number, link, G)
        words = words_at(own + zone.told, 8) + 2 * peer
        wanted = (peer < G.size) & (((there >> peer) & 1) != 0)
        num_sent = counted(words, wanted, peer, number, link, G)
        first = ticket - call.num_senders - 3 - TIMERS
        for item in range(first, G.size * tl.cdiv(call.num_slots, AT_ONCE), call.num_placers):
            src, begin = (link.rank + item) % G.size, item // G.size * AT_ONCE
            num = tl.minimum(tl.sum(tl.where(peer == src, num_sent, 0)), call.num_slots)
            _note(own, views, src, begin, num, link, zone, call, number, ROW, E, AT_ONCE, G)


@triton.jit
def _note_ranks(own, views, link, zone, call, number, E: tl.constexpr, G: tl.constexpr):
    """Note how many tokens each rank has, -1 for those that this one goes on without."""
    peer = tl.arange(0, G.padded)
    words = words_at(own + zone.told, 8) + 2 * peer
    if G.can_shrink:
        there = agree(own, link, zone, call, number, E, G)
        num_sent = tl.where(there, counted(words, peer < G.size, peer, number, link, G), -1)
    else:
        num_sent = counted(words, peer < G.size, peer, number, link, G)
    to = words_at(views.src_idx, 4) + G.size * call.num_slots + peer
    tl.store(to, num_sent, mask=peer < G.size)


@triton.jit
def _note(
    own,
    views,
    src,
    begin,
    num_sent,
    link,
    zone,
    call,
    number,
    ROW: tl.constexpr,
    E: tl.constexpr,
    AT_ONCE: tl.constexpr,
    G: tl.constexpr,
):
    """Note which of a few slots of a rank have rows, and what their tokens chose here."""
    token, slot = begin + tl.arange(0, AT_ONCE), tl.arange(0, E.padded_topk)
    item, sent = src * call.num_slots + token, token < num_sent
    flags = words_at(own + zone.flags, 4) + item
    if G.can_shrink:
        flag = read_flags(flags, sent)
    else:
        flag = wait_flags(flags, sent, token * 0 + src, number, link, ROWS, G, 1)
    come = sent & (flag == number * 2 + 1)
    at = own + zone.landing + item.to(tl.int64) * ROW.stride
    if ROW.checked:
        for nth in range(AT_ONCE):
            this = (token == begin + nth) & come
            if tl.max(this.to(tl.int32)) > 0:
                row = tl.sum(tl.where(this, at, 0))
                payload = load_pieces(words_at(row, ROW.word), ROW.num_words, ROW.words)
                found = sum_of_pieces(payload, ROW.num_words, ROW.words)
                told = tl.load(words_at(row + ROW.check_at, 8))
                check_sum(found, told, src, number, link, G)
    asked = come[:, None] & (slot < E.num_topk)[None, :]
    words = words_at(at + ROW.choices_at, 8)[:, None] + slot[None, :]
    choices = tl.load(words, mask=asked, other=0x7FFFFFFF)
    local = (choices & 0x7FFFFFFF).to(tl.int32) - link.rank * E.local
    is_here = asked & (local >= 0) & (local < E.local)
    real = token < call.num_slots
    tl.store(words_at(views.src_idx, 4) + item, tl.where(come, token, -1), mask=real)
    choice = item.to(tl.int64)[:, None] * E.num_topk + slot[None, :]
    noted = real[:, None] & (slot < E.num_topk)[None, :]
    idx = tl.where(is_here, local, -1).to(tl.int64)
    tl.store(words_at(views.topk_idx, 8) + choice, idx, mask=noted)
    if E.has_weights:
        words = words_at(at + ROW.choices_at + 8 * E.num_topk, 4)[:, None] + slot[None, :]
        weights = tl.load(words, mask=is_here, other=0)
        tl.store(words_at(views.topk_weights, 4) + choice, weights, mask=is_here)


@triton.jit
def return_experts(
    chosen,
    returned,
    link,
    zone,
    call,
    P: tl.constexpr,
    PULLS: tl.constexpr,
    PIECE: tl.constexpr,
    G: tl.constexpr,
):
    """Send back what there is for the tokens of every rank, or let them read it, and add it up.

    They read `PIECE` columns of a row of every rank at once.
    """
    TIMERS: tl.constexpr = G.size if P.counts_waits else 0
    follow(G)
    own = heap_of(link, link.rank)
    ticket, number = draw_ticket(link, 1 + call.num_senders + TIMERS + call.num_reducers)
    takes_part = tl.cast(1, tl.int1)
    if G.can_shrink:
        takes_part = is_left_out(link) == 0
    if ticket == 0:
        if takes_part:
            enter(link, number, G)
            post_rounds(link, number, DISPATCHES=False, LEAVES=False, G=G)
    elif ticket <= call.num_senders:
        if PULLS:
            if wait_for_credit(own, link.kind, number, link, BACK_CREDIT, G) & takes_part:
                peer = tl.arange(0, G.padded)
                heaps = heaps_of(link, peer, peer < G.size)
                flags = words_at(heaps + zone.flags, 4) + link.rank * call.num_slots
                raise_flags(flags, peer < G.size, number)
        else:
            granted = tl.cast(0, tl.int1)
            num_items = G.size * call.num_slots * takes_part.to(tl.int32)
            for item in range(ticket - 1, num_items, call.num_senders):
                granted = _send(own, returned, item, link, zone, call, number, granted, P, G)
    elif ticket <= call.num_senders + TIMERS:
        src = ticket - 1 - call.num_senders
        if PULLS:
            _time_rank(own, chosen, src, link, zone, call, number, G)
        else:
            time_sums(own, chosen, returned, src, link, zone, call, number, P, G)
    else:
        first = ticket - 1 - call.num_senders - TIMERS
        if PULLS:
            _read(own, chosen, returned, first, link, zone, call, number, P, PIECE, G)
        else:
            for token in range(first, call.num_tokens, call.num_reducers):
                add_up(own, chosen, returned, token, link, zone, call, number, P, G)


@triton.jit
def _send(own, returned, item, link, zone, call, number, granted, P: tl.constexpr, G: tl.constexpr):
    """Send the row of a slot to the rank whose token it is, if there is one.

    Returns whether that was allowed: the next row of the program need not ask.
    """
    credit = look_for_credit(own, link.kind, link, G)
    src, slot = (link.rank + 1 + item) % G.size, item // G.size
    row = src * call.num_slots + slot
    if tl.load(words_at(returned.src_info, 4) + row) >= 0:
        lane = tl.arange(0, P.padded)
        begin = row_of_x(returned.x + row.to(tl.int64) * (2 * P.hidden), P)
        total = tl.load(begin + lane, mask=lane < P.hidden, other=0.0).to(tl.float32)
        if granted == 0:
            granted = has_credit(credit, own, link.kind, number, link, BACK_CREDIT, G)
        if granted:
            base, to = heap_of(link, src), link.rank * call.num_slots + slot
            store_sum(base + zone.landing + tl.cast(to, tl.int64) * P.stride, total, P, G)
            raise_flags(words_at(base + zone.flags, 4) + to, None, number)
    return granted


@triton.jit
def _time_rank(own, chosen, src, link, zone, call, number, G: tl.constexpr):
    """Measure how long a rank is waited for."""
    nth = tl.arange(0, 1)
    flag = words_at(own + zone.flags, 4) + src * call.num_slots + nth
    spent = time_flags(flag, nth == 0, nth * 0 + src, number, link, SUMS, G, 0)
    waits = words_at(chosen.waits, 8) + src
    tl.store(waits, tl.load(waits) + spent)


@triton.jit
def _read(
    own,
    chosen,
    returned,
    first,
    link,
    zone,
    call,
    number,
    P: tl.constexpr,
    PIECE: tl.constexpr,
    G: tl.constexpr,
):
    """Add up pieces of rows that lie on other ranks, once all ranks have written theirs."""
    peer, slot = tl.arange(0, G.padded), tl.arange(0, P.padded_topk)
    lane = tl.arange(0, PIECE)
    NUM: tl.constexpr = (P.hidden + PIECE - 1) // PIECE
    flags = words_at(own + zone.flags, 4) + peer * call.num_slots
    flag = wait_flags(flags, peer < G.size, peer, number, link, SUMS, G, 0)
    for item in range(first, call.num_tokens * NUM, call.num_reducers):
        token, column = item // NUM, item % NUM * PIECE + lane
        words = words_at(chosen.topk_idx, 8) + token * P.num_topk + slot
        ids = tl.load(words, mask=slot < P.num_topk, other=-1).to(tl.int32)
        owner = tl.where(ids >= 0, ids // P.local, -1)
        is_there = tl.max((owner[None, :] == peer[:, None]).to(tl.int32), 1) > 0
        if G.can_shrink:
            sent = words_at(returned.src_info, 4) + returned.num_sent + peer
            is_there = is_there & (tl.load(sent, mask=peer < G.size, other=-1) >= 0)
        is_there = is_there & (flag == number)
        total = tl.zeros([lane.numel], tl.float32)
        SIZE: tl.constexpr = G.size
        for rank in tl.static_range(SIZE):
            row = tl.cast(link.rank * call.num_slots + token, tl.int64) * (2 * P.hidden)
            at = row_of_x(heap_of(link, rank) + zone.landing + row, P)
            here = tl.max(tl.where(peer == rank, is_there.to(tl.int32), 0)) > 0
            total += tl.load(at + column, mask=(column < P.hidden) & here, other=0.0).to(tl.float32)
        to = row_of_x(chosen.out + tl.cast(token, tl.int64) * (2 * P.hidden), P)
        tl.store(to + column, round_sum(total, tl.bfloat16, G.is_compiled), mask=column < P.hidden)
