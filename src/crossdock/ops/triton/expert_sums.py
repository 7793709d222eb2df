"""Low-latency combine in one kernel: rows are weighted, added up, sent back, and added up again.

Roles, by ticket: one program tells which rounds are over; a few send the weights ahead, tagged, to
the ranks that own the experts; some add up what this rank's experts have for a token, wait for its
weights, and send one row back; the others wait for the rows of a token of this rank and add them up
in rank order. Launched in two parts it is a hook, as in `expert_rows`.

Sums are float32: those of a rank by ascending choice, those of the ranks by ascending rank.

T tokens here, K top-k, R ranks, L local experts, M slots for the tokens of a rank, H columns.

Example (2 ranks, 1 expert each, H=1): a token of rank 0 chose experts [0,1] with weights [0.5,2];
    they return 10 and 20 -> rank 0 sends 5 to itself, rank 1 sends 40, the token gets 45
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from crossdock.ops.triton.links import Address, heap_of, heaps_of, row_at, words_at
from crossdock.ops.triton.masked import is_left_out
from crossdock.ops.triton.quantize import load_log, load_ranges, round_sum, store_log
from crossdock.ops.triton.row_checks import check_sum, sum_of
from crossdock.ops.triton.signals import enter, post_rounds, raise_flags, tagged
from crossdock.ops.triton.sync import (
    draw_ticket,
    follow,
    has_credit,
    look_for_credit,
    time_flags,
    wait_flags,
    wait_for_credit,
    wait_singled,
)

__all__ = [
    "Chosen",
    "Partial",
    "ReturnCall",
    "ReturnZone",
    "Returned",
    "add_up",
    "combine_experts",
    "row_of_x",
    "store_sum",
    "time_sums",
]

WEIGHTS = tl.constexpr(4)
SUMS = tl.constexpr(5)
CREDIT = tl.constexpr(6)


class Partial(NamedTuple):
    """How a rank's sum travels, as constants of a kernel.

    Attributes:
        hidden, padded: H, and the next power of two.
        is_float: sums are rounded to float32, otherwise to bf16.
        is_log, ranges_at: whether they travel in the logarithmic format, and where ranges begin.
        checked, check_at: see `expert_records.ExpertRow`.
        num_bytes, padded_bytes: of what travels, but for ranges, and the next power of two.
        stride: bytes from row to row.
        aligned: whether rows of x begin on 16-byte bounds.
        num_topk, padded_topk: K.
        local, padded_local: L.
        compact, x_is_compact: whether dispatch laid rows back to back, and whether x is laid so.
        tellers: programs that send weights ahead; 0 where dispatch was given them.
        at_once: weights that one sends at a time, a power of two.
        counts_waits: whether programs measure how long each rank is waited for.
    """

    hidden: int
    padded: int
    is_float: bool
    is_log: bool
    ranges_at: int
    checked: bool
    check_at: int
    num_bytes: int
    padded_bytes: int
    stride: int
    aligned: bool
    num_topk: int
    padded_topk: int
    local: int
    padded_local: int
    compact: bool
    x_is_compact: bool
    tellers: int
    at_once: int
    counts_waits: bool


class Chosen(NamedTuple):
    """This rank's tokens: topk_idx and weights [T, K], and where the result goes [T, H] bf16.

    Also [R] int64, to which the time that each rank is waited for is added.
    """

    topk_idx: Address
    topk_weights: Address
    out: Address
    waits: Address


class Returned(NamedTuple):
    """What the experts return: x, and of `Slabs` layout_range, src_info, and what lies behind."""

    x: Address
    layout_range: Address
    src_info: Address
    row_of: int
    weights: int
    num_sent: int


class ReturnZone(NamedTuple):
    """Offsets in the heap.

    Attributes:
        landing: [R, M] rows, by the rank that sends them.
        flags: [R, M] int32, the number of the round.
        weights: [R, M, K] tagged, by the rank whose tokens they are of.
    """

    landing: Address
    flags: Address
    weights: Address


class ReturnCall(NamedTuple):
    """What changes from call to call: T, M, programs."""

    num_tokens: int
    num_slots: int
    num_senders: int
    num_reducers: int


@triton.jit
def combine_experts(chosen, returned, link, zone, call, P: tl.constexpr, G: tl.constexpr):
    """Send the sums of this rank's experts, and add up those that come; see the module."""
    TELLERS: tl.constexpr = 1 + P.tellers
    TIMERS: tl.constexpr = G.size if P.counts_waits else 0
    follow(G)
    own = heap_of(link, link.rank)
    ticket, number = draw_ticket(link, TELLERS + call.num_senders + TIMERS + call.num_reducers)
    takes_part = tl.cast(1, tl.int1)
    if G.can_shrink:
        takes_part = is_left_out(link) == 0
    if ticket == 0:
        if takes_part:
            enter(link, number, G)
            post_rounds(link, number, DISPATCHES=False, LEAVES=False, G=G)
    elif ticket < TELLERS:
        if wait_for_credit(own, link.kind, number, link, CREDIT, G) & takes_part:
            _send_weights(ticket - 1, chosen, link, zone, call, number, P, G)
    elif ticket < TELLERS + call.num_senders:
        peer = tl.arange(0, G.padded)
        words = words_at(returned.src_info, 4) + returned.num_sent + peer
        num_sent = tl.load(words, mask=(peer < G.size) & takes_part, other=0)
        granted = tl.cast(0, tl.int1)
        for item in range(ticket - TELLERS, G.size * tl.max(num_sent), call.num_senders):
            src = (link.rank + 1 + item) % G.size
            if item // G.size < tl.sum(tl.where(peer == src, num_sent, 0)):
                token = item // G.size
                granted = _send_sum(
                    own, returned, src, token, link, zone, call, number, granted, P, G
                )
    elif ticket < TELLERS + call.num_senders + TIMERS:
        src = ticket - TELLERS - call.num_senders
        time_sums(own, chosen, returned, src, link, zone, call, number, P, G)
    else:
        first = ticket - TELLERS - call.num_senders - TIMERS
        for token in range(first, call.num_tokens, call.num_reducers):
            add_up(own, chosen, returned, token, link, zone, call, number, P, G)


@triton.jit
def _send_weights(nth, chosen, link, zone, call, number, P: tl.constexpr, G: tl.constexpr):
    """Send every weight to the rank that owns its expert."""
    num_words = call.num_tokens * P.num_topk
    for begin in range(nth * P.at_once, num_words, P.tellers * P.at_once):
        word = begin + tl.arange(0, P.at_once)
        ids = tl.load(words_at(chosen.topk_idx, 8) + word, mask=word < num_words, other=-1)
        ids = ids.to(tl.int32)
        weights = tl.load(words_at(chosen.topk_weights, 4) + word, mask=ids >= 0, other=0)
        base = heaps_of(link, ids // P.local, ids >= 0)
        words = words_at(base + zone.weights, 8) + link.rank * call.num_slots * P.num_topk + word
        tl.store(words, tagged(weights, number), mask=ids >= 0)


@triton.jit
def row_of_x(address, P: tl.constexpr):
    """Pointer to the elements of a row of the caller's."""
    if P.aligned:
        return row_at(address, tl.bfloat16)
    else:
        return tl.cast(address, tl.int64).to(tl.pointer_type(tl.bfloat16), bitcast=True)


@triton.jit
def _term(returned, rows, which, lane, P: tl.constexpr):
    """The one row of x that is meant; zeros if none is."""
    row = tl.sum(tl.where(which, rows, 0))
    there = tl.max(which.to(tl.int32)) > 0
    begin = returned.x + row.to(tl.int64) * (2 * P.hidden)
    term = tl.load(row_of_x(begin, P) + lane, mask=(lane < P.hidden) & there, other=0.0)
    return term.to(tl.float32)


@triton.jit
def _weights(own, returned, word, rows, src, link, zone, number, P: tl.constexpr, G: tl.constexpr):
    """The weights of a token's choices here, [K] float32, and whether they are known.

    Those of ranks that are gone on without are 0.
    """
    known = tl.full([], True, tl.int1)
    if P.tellers == 0:
        at = words_at(returned.src_info, 4) + returned.weights + word
        bits = tl.load(at, mask=rows >= 0, other=0)
    else:
        words = words_at(own + zone.weights, 8) + word
        wanted, ranks = rows >= 0, rows * 0 + src
        bits, known = wait_singled(words, wanted, ranks, number, link, WEIGHTS, G)
    return bits.to(tl.float32, bitcast=True), known


@triton.jit
def _rows_of_x(returned, rows, call, P: tl.constexpr, G: tl.constexpr):
    """The rows of x, which may be laid out in the other of the two ways: [K] int32, -1 for none."""
    if P.compact == P.x_is_compact:
        return rows
    else:
        expert = tl.arange(0, P.padded_local)
        last = words_at(returned.layout_range, 8) + expert * G.size + (G.size - 1)
        found = tl.load(last, mask=expert < P.local, other=0)
        counts = ((found >> 32) + (found & 0x7FFFFFFF)).to(tl.int32)
        end = tl.cumsum(counts, 0)
        slab_rows = G.size * call.num_slots
        if P.compact:
            is_behind = (rows[:, None] >= end[None, :]) & (expert < P.local)[None, :]
            of_row = tl.sum(is_behind.to(tl.int32), 1)
        else:
            of_row = rows // slab_rows
        is_it = of_row[:, None] == expert[None, :]
        begin = tl.sum(tl.where(is_it, (end - counts)[None, :], 0), 1)
        shift = of_row * slab_rows - begin
        if P.compact:
            return tl.where(rows >= 0, rows + shift, -1)
        else:
            return tl.where(rows >= 0, rows - shift, -1)


@triton.jit
def _send_sum(
    own, returned, src, token, link, zone, call, number, granted, P: tl.constexpr, G: tl.constexpr
):
    """Add up what the experts here have for a token, weighted, and send it to its rank.

    Returns whether that was allowed: the next sum of the program need not ask.
    """
    credit = look_for_credit(own, link.kind, link, G)
    slot = tl.arange(0, P.padded_topk)
    lane = tl.arange(0, P.padded)
    word = (src * call.num_slots + token) * P.num_topk + slot
    rows = tl.load(
        words_at(returned.src_info, 4) + returned.row_of + word, mask=slot < P.num_topk, other=-1
    )
    if tl.max(rows) >= 0:
        rows = _rows_of_x(returned, rows, call, P, G)
        chosen = rows >= 0
        nth = tl.cumsum(chosen.to(tl.int32), 0) - 1
        first, second = chosen & (nth == 0), chosen & (nth == 1)
        # Loaded while the weights, and word that sums may be written, are on their way.
        term, other = _term(returned, rows, first, lane, P), _term(returned, rows, second, lane, P)
        weights, known = _weights(own, returned, word, rows, src, link, zone, number, P, G)
        total = term * tl.sum(tl.where(first, weights, 0.0))
        total += other * tl.sum(tl.where(second, weights, 0.0))
        for pair in range(2, tl.sum(chosen.to(tl.int32)), 2):
            first, second = chosen & (nth == pair), chosen & (nth == pair + 1)
            term = _term(returned, rows, first, lane, P)
            other = _term(returned, rows, second, lane, P)
            total += term * tl.sum(tl.where(first, weights, 0.0))
            total += other * tl.sum(tl.where(second, weights, 0.0))
        begin = tl.cast(link.rank * call.num_slots + token, tl.int64) * P.stride
        base = heap_of(link, src)
        if granted == 0:
            granted = has_credit(credit, own, link.kind, number, link, CREDIT, G)
        if granted & known:
            store_sum(base + zone.landing + begin, total, P, G)
            flag = words_at(base + zone.flags, 4) + link.rank * call.num_slots + token
            raise_flags(flag, None, number)
    return granted


@triton.jit
def _was_there(returned, ranks, G: tl.constexpr):
    """Whether ranks took part in the dispatch: what they got nothing of they do not return."""
    words = words_at(returned.src_info, 4) + returned.num_sent + ranks
    return tl.load(words, mask=ranks < G.size, other=-1) >= 0


@triton.jit
def store_sum(to, total, P: tl.constexpr, G: tl.constexpr):
    """Write a sum where it travels from."""
    lane = tl.arange(0, P.padded)
    if not P.is_float:
        total = round_sum(total, tl.bfloat16, G.is_compiled)
    if P.is_log:
        values = tl.reshape(total.to(tl.float32), [P.padded // 64, 64])
        ranges = row_at(to + P.ranges_at, tl.float32)
        low, high = store_log(row_at(to, tl.uint8), ranges, values, P.hidden)
        if P.checked:
            told = sum_of(tl.ravel(low)) + sum_of(high)
            tl.store(words_at(to + P.check_at, 8), told)
    else:
        row = row_at(to, tl.float32 if P.is_float else tl.bfloat16)
        tl.store(row + lane, total, mask=lane < P.hidden)
        if P.checked:
            WORD: tl.constexpr = tl.int32 if P.is_float else tl.int16
            told = sum_of(tl.where(lane < P.hidden, total.to(WORD, bitcast=True), 0))
            tl.store(words_at(to + P.check_at, 8), told)


@triton.jit
def _check_sum(at, here, r, number, link, P: tl.constexpr, G: tl.constexpr):
    """Report a rank whose sum is not what it was."""
    byte = tl.arange(0, P.padded_bytes)
    row = tl.load(words_at(at, 1) + byte, mask=(byte < P.num_bytes) & here, other=0)
    told = tl.load(words_at(at + P.check_at, 8), mask=here, other=0)
    check_sum(sum_of(row), told, r, number, link, G)


@triton.jit
def _load_sum(at, here, P: tl.constexpr):
    """A sum that has come, zeros if it is not here: [H] float32."""
    lane = tl.arange(0, P.padded)
    if P.is_log:
        block, column = tl.arange(0, P.padded // 64), tl.reshape(lane, [P.padded // 64, 64])
        column = tl.where(here, column, P.hidden)
        top, step = load_ranges(row_at(at + P.ranges_at, tl.float32), block, P.hidden)
        packed = row_at(at, tl.uint8)
        values = load_log(packed, column, top[:, None], step[:, None], P.hidden)
        total = tl.reshape(tl.where(here, values, 0.0), [P.padded])
    else:
        row = row_at(at, tl.float32 if P.is_float else tl.bfloat16)
        total = tl.load(row + lane, mask=(lane < P.hidden) & here, other=0.0).to(tl.float32)
    return total


@triton.jit
def time_sums(
    own, chosen, returned, src, link, zone, call, number, P: tl.constexpr, G: tl.constexpr
):
    """Measure how long the rows of a rank are waited for."""
    slot, spent = tl.arange(0, P.padded_topk), tl.cast(0, tl.int64)
    SIZE: tl.constexpr = P.at_once // P.padded_topk
    for begin in range(0, call.num_tokens, SIZE):
        token = begin + tl.arange(0, SIZE)
        real = (token < call.num_tokens)[:, None] & (slot < P.num_topk)[None, :]
        words = words_at(chosen.topk_idx, 8) + token[:, None] * P.num_topk + slot[None, :]
        ids = tl.load(words, mask=real, other=-1).to(tl.int32)
        wanted = tl.max(((ids >= 0) & (ids // P.local == src)).to(tl.int32), 1) > 0
        if G.can_shrink:
            wanted = wanted & _was_there(returned, token * 0 + src, G)
        words = words_at(own + zone.flags, 4) + src * call.num_slots + token
        spent += time_flags(words, wanted, token * 0 + src, number, link, SUMS, G, 0)
    waits = words_at(chosen.waits, 8) + src
    tl.store(waits, tl.load(waits) + spent)


@triton.jit
def add_up(
    own, chosen, returned, token, link, zone, call, number, P: tl.constexpr, G: tl.constexpr
):
    """Add up the rows of a token in rank order."""
    slot, peer = tl.arange(0, P.padded_topk), tl.arange(0, G.padded)
    lane = tl.arange(0, P.padded)
    words = words_at(chosen.topk_idx, 8) + token * P.num_topk + slot
    ids = tl.load(words, mask=slot < P.num_topk, other=-1).to(tl.int32)
    owner = tl.where(ids >= 0, ids // P.local, -1)
    is_there = tl.max((owner[None, :] == peer[:, None]).to(tl.int32), 1) > 0
    if G.can_shrink:
        is_there = is_there & _was_there(returned, peer, G)
    words = words_at(own + zone.flags, 4) + peer * call.num_slots + token
    flags = wait_flags(words, is_there, peer, number, link, SUMS, G, 0)
    has_come = is_there & (flags == number)
    total = tl.zeros([P.padded], tl.float32)
    SIZE: tl.constexpr = G.size
    for r in tl.static_range(SIZE):
        here = tl.max(((peer == r) & has_come).to(tl.int32)) > 0
        begin = tl.cast(r * call.num_slots + token, tl.int64) * P.stride
        if P.checked:
            _check_sum(own + zone.landing + begin, here, r, number, link, P, G)
        total += _load_sum(own + zone.landing + begin, here, P)
    to = chosen.out + tl.cast(token, tl.int64) * (2 * P.hidden)
    rounded = round_sum(total, tl.bfloat16, G.is_compiled)
    tl.store(row_of_x(to, P) + lane, rounded, mask=lane < P.hidden)
