"""Low-latency dispatch, the sending half: a row is encoded, and written to the ranks that want it.

T tokens here, K top-k, R ranks, H columns. See `expert_rows`.

Example (2 ranks, 1 expert each): a token chose experts [1,0]; 3 earlier ones chose expert 0, and 5
    expert 1 -> its row is written to both ranks, with the words (5, 1) and (3, 0)
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.ops.triton.choices import count_earlier
from crossdock.ops.triton.links import heaps_of, row_at, words_at
from crossdock.ops.triton.pieces import load_pieces, num_pieces, store_piece
from crossdock.ops.triton.quantize import UE8M0, encode_part, largest
from crossdock.ops.triton.row_checks import sum_of_pieces
from crossdock.ops.triton.signals import raise_flags, tagged
from crossdock.ops.triton.sync import has_credit, look_for_credit

__all__ = ["CREDIT", "send_row"]

CREDIT = tl.constexpr(3)


@triton.jit
def send_row(
    own,
    tokens,
    token,
    link,
    zone,
    call,
    number,
    granted,
    ROW: tl.constexpr,
    E: tl.constexpr,
    G: tl.constexpr,
):
    """Write one row to every rank that has an expert for it, and say to all ranks which.

    Loaded and encoded while it is not yet known whether it may be written, which is returned: the
    next row of the program need not ask.
    """
    credit = look_for_credit(own, link.kind, link, G)
    slot, peer = tl.arange(0, E.padded_topk), tl.arange(0, G.padded)
    nth = token * E.num_topk + slot
    ids = tl.load(words_at(tokens.topk_idx, 8) + nth, mask=slot < E.num_topk, other=-1)
    ids = ids.to(tl.int32)
    weights = slot
    if E.has_weights:
        weights = tl.load(words_at(tokens.topk_weights, 4) + nth, mask=slot < E.num_topk, other=0)
    row, scales = _load_row(tokens, token, ROW)
    heaps = heaps_of(link, peer, peer < G.size)
    owner = tl.where(ids >= 0, ids // E.local, -1)
    is_sent = tl.max((owner[None, :] == peer[:, None]).to(tl.int32), 1)
    earlier = slot * 0 if E.viewed else count_earlier(tokens.topk_idx, token, E)
    choices = tagged(earlier, ids & 0x7FFFFFFF)
    if ROW.rule != "":
        row, scales = _encoded(row, ROW)
    if ROW.checked:
        ENCODED: tl.constexpr = ROW.rule != ""
        WIDTH: tl.constexpr = ROW.hidden if ENCODED else ROW.num_words
        told = sum_of_pieces(row, WIDTH, ROW.columns if ENCODED else ROW.words)
    if granted == 0:
        granted = has_credit(credit, own, link.kind, number, link, CREDIT, G)
    if granted:
        begin = zone.landing + tl.cast(link.rank * call.num_slots + token, tl.int64) * ROW.stride
        for step in range(G.size):
            this = peer == (link.rank + 1 + step) % G.size
            if tl.max(tl.where(this, is_sent, 0)) > 0:
                at = tl.sum(tl.where(this, heaps, 0)) + begin
                _write_row(at, row, scales, ROW)
                tl.store(words_at(at + ROW.choices_at, 8) + slot, choices, mask=slot < E.num_topk)
                if E.has_weights:
                    words = words_at(at + ROW.choices_at + 8 * E.num_topk, 4) + slot
                    tl.store(words, weights, mask=slot < E.num_topk)
                if ROW.checked:
                    tl.store(words_at(at + ROW.check_at, 8), told)
        flags = words_at(heaps + zone.flags, 4) + link.rank * call.num_slots + token
        raise_flags(flags, peer < G.size, number * 2 + is_sent)
    return granted


@triton.jit
def _load_row(tokens, token, ROW: tl.constexpr):
    """The pieces of a token as it lies there, columns if it is to be encoded, and its scales."""
    scales = tl.zeros([ROW.padded_scales], tl.int32)
    if ROW.rule == "":
        begin = words_at(tokens.x + tl.cast(token, tl.int64) * ROW.num_bytes, ROW.word)
        row = load_pieces(begin, ROW.num_words, ROW.words)
        if ROW.num_scales:
            scale = tl.arange(0, ROW.padded_scales)
            begin = words_at(tokens.scales + tl.cast(token, tl.int64) * (4 * ROW.num_scales), 4)
            scales = tl.load(begin + scale, mask=scale < ROW.num_scales)
    else:
        begin = tokens.x + tl.cast(token, tl.int64) * (2 * ROW.hidden)
        if ROW.hidden % 8 == 0:
            row = load_pieces(row_at(begin, tl.int16), ROW.hidden, ROW.columns)
        else:
            row = load_pieces(words_at(begin, 2), ROW.hidden, ROW.columns)
    return row, scales


@triton.jit
def _encoded(row, ROW: tl.constexpr):
    """The codes of a row, in pieces, and their scales: of each piece, or one for all."""
    NUM: tl.constexpr = num_pieces(ROW.hidden, ROW.columns)
    size = tl.zeros([1], tl.int32)
    if ROW.block == 0:
        for nth in tl.static_range(NUM):
            size = tl.maximum(size, largest(_values_of(row[nth], ROW)))
    codes, scales = (), ()
    for nth in tl.static_range(NUM):
        values = _values_of(row[nth], ROW)
        if ROW.block:
            size = largest(values)
        part, of_part = encode_part(
            values, size, ROW.rule, ROW.element, ROW.min_amax, ROW.use_casts
        )
        codes += (tl.reshape(part, [part.numel]),)
        scales += (of_part,)
    return codes, scales


@triton.jit
def _values_of(piece, ROW: tl.constexpr):
    """The columns of a piece as float32, a scaled block to a row of the tile."""
    values = piece.to(tl.bfloat16, bitcast=True).to(tl.float32)
    BLOCK: tl.constexpr = ROW.block or piece.numel
    return tl.reshape(values, [piece.numel // BLOCK, BLOCK])


@triton.jit
def _write_row(at, row, scales, ROW: tl.constexpr):
    """Write a row to a place where it is wanted."""
    if ROW.rule == "":
        for nth in tl.static_range(num_pieces(ROW.num_words, ROW.words)):
            store_piece(words_at(at, ROW.word), nth, row[nth], True, ROW.num_words, ROW.words)
        if ROW.num_scales:
            scale = tl.arange(0, ROW.padded_scales)
            words = words_at(at + ROW.scales_at, 4) + scale
            tl.store(words, scales, mask=scale < ROW.num_scales)
    else:
        for nth in tl.static_range(num_pieces(ROW.hidden, ROW.columns)):
            store_piece(row_at(at, tl.uint8), nth, row[nth], True, ROW.hidden, ROW.columns)
            if ROW.block or nth == 0:
                _write_scales(at + ROW.scales_at, nth, scales[nth], ROW)


@triton.jit
def _write_scales(at, nth: tl.constexpr, scales, ROW: tl.constexpr):
    """Write the scales of a piece, of which there are as many to each piece but the last."""
    PER_PIECE: tl.constexpr = ROW.columns // ROW.block if ROW.block else 1
    if ROW.rule == UE8M0:
        to, scales = words_at(at, 1), scales.to(tl.uint8)
        NUM: tl.constexpr = 4 * ROW.num_scales
    else:
        to, scales = words_at(at, 4), scales.to(tl.int32, bitcast=True)
        NUM: tl.constexpr = ROW.num_scales
    store_piece(to, nth, scales, True, NUM, PER_PIECE)
