"""Low-latency dispatch, the sending half: a row is encoded, and written to the ranks that want it.

T tokens here, K top-k, R ranks, H columns. See `expert_rows`.

Example (2 ranks, 1 expert each): a token chose experts [1,0]; 3 earlier ones chose expert 0, and 5
    expert 1 -> its row is written to both ranks, with the words (5, 1) and (3, 0)
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.ops.triton.choices import count_earlier
from crossdock.ops.triton.links import heap_of, heaps_of, row_at, words_at
from crossdock.ops.triton.pieces import load_pieces, num_pieces, store_piece
from crossdock.ops.triton.quantize import UE8M0, encode_part, largest
from crossdock.ops.triton.sync import has_credit, look_for_credit, raise_flags, tagged

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
    ROW: tl.constexpr,
    E: tl.constexpr,
    G: tl.constexpr,
):
    """Write one row to every rank that has an expert for it, and say to all ranks which.

    Loaded while it is not yet known whether it may be written.
    """
    credit = look_for_credit(own, link.kind, link, G)
    slot = tl.arange(0, E.padded_topk)
    words = words_at(tokens.topk_idx, 8) + token * E.num_topk + slot
    ids = tl.load(words, mask=slot < E.num_topk, other=-1).to(tl.int32)
    owner = tl.where(ids >= 0, ids // E.local, -1)
    row, scales = _load_row(tokens, token, ROW)
    begin = zone.landing + tl.cast(link.rank * call.num_slots + token, tl.int64) * ROW.stride
    SIZE: tl.constexpr = G.size
    wanted, places = (), ()
    for step in tl.static_range(SIZE):
        dst = (link.rank + 1 + step) % SIZE
        wanted += (tl.max((owner == dst).to(tl.int32)) > 0,)
        places += (heap_of(link, dst) + begin,)
    choices = tagged(count_earlier(tokens.topk_idx, token, E), ids & 0x7FFFFFFF)
    if has_credit(credit, own, link.kind, number, link, CREDIT, G):
        if ROW.rule == "":
            _send_words(row, scales, wanted, places, ROW, G)
        else:
            _send_encoded(row, wanted, places, ROW, G)
        _send_choices(tokens, token, choices, wanted, places, ROW, E, G)
        peer = tl.arange(0, G.padded)
        is_sent = tl.max((owner[None, :] == peer[:, None]).to(tl.int32), 1)
        base = heaps_of(link, peer, peer < SIZE)
        flags = words_at(base + zone.flags, 4) + link.rank * call.num_slots + token
        raise_flags(flags, peer < SIZE, number * 2 + is_sent)


@triton.jit
def _send_choices(
    tokens, token, choices, wanted, places, ROW: tl.constexpr, E: tl.constexpr, G: tl.constexpr
):
    """Write what a token chose, and how it is weighted, behind its row."""
    slot = tl.arange(0, E.padded_topk)
    SIZE: tl.constexpr = G.size
    for step in tl.static_range(SIZE):
        if wanted[step]:
            at = places[step] + ROW.choices_at
            tl.store(words_at(at, 8) + slot, choices, mask=slot < E.num_topk)
            if E.has_weights:
                mine = words_at(tokens.topk_weights, 4) + token * E.num_topk + slot
                weights = tl.load(mine, mask=slot < E.num_topk, other=0)
                theirs = words_at(at + 8 * E.num_topk, 4) + slot
                tl.store(theirs, weights, mask=slot < E.num_topk)


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
def _send_words(row, scales, wanted, places, ROW: tl.constexpr, G: tl.constexpr):
    """Write a row that is moved as it is to the places where it is wanted."""
    NUM: tl.constexpr = num_pieces(ROW.num_words, ROW.words)
    SIZE: tl.constexpr = G.size
    for step in tl.static_range(SIZE):
        if wanted[step]:
            for nth in tl.static_range(NUM):
                words = words_at(places[step], ROW.word)
                store_piece(words, nth, row[nth], True, ROW.num_words, ROW.words)
            if ROW.num_scales:
                scale = tl.arange(0, ROW.padded_scales)
                words = words_at(places[step] + ROW.scales_at, 4) + scale
                tl.store(words, scales, mask=scale < ROW.num_scales)


@triton.jit
def _send_encoded(row, wanted, places, ROW: tl.constexpr, G: tl.constexpr):
    """Encode a row, and write it to the places where it is wanted: each piece before the next."""
    NUM: tl.constexpr = num_pieces(ROW.hidden, ROW.columns)
    SIZE: tl.constexpr = G.size
    if ROW.block == 0:
        size = tl.zeros([1], tl.int32)
        for nth in tl.static_range(NUM):
            size = tl.maximum(size, largest(_values_of(row[nth], ROW)))
    for nth in tl.static_range(NUM):
        values = _values_of(row[nth], ROW)
        if ROW.block:
            size = largest(values)
        codes, scales = encode_part(
            values, size, ROW.rule, ROW.element, ROW.min_amax, ROW.use_casts
        )
        codes = tl.reshape(codes, [codes.numel])
        for step in tl.static_range(SIZE):
            to = row_at(places[step], tl.uint8)
            store_piece(to, nth, codes, wanted[step], ROW.hidden, ROW.columns)
            if ROW.block or nth == 0:
                _send_scales(places[step], nth, scales, wanted[step], ROW)


@triton.jit
def _values_of(piece, ROW: tl.constexpr):
    """The columns of a piece as float32, a scaled block to a row of the tile."""
    values = piece.to(tl.bfloat16, bitcast=True).to(tl.float32)
    BLOCK: tl.constexpr = ROW.block or piece.numel
    return tl.reshape(values, [piece.numel // BLOCK, BLOCK])


@triton.jit
def _send_scales(place, nth: tl.constexpr, scales, wanted, ROW: tl.constexpr):
    """Write the scales of a piece, of which there are as many to each piece but the last."""
    PER_PIECE: tl.constexpr = ROW.columns // ROW.block if ROW.block else 1
    if ROW.rule == UE8M0:
        to, scales = words_at(place + ROW.scales_at, 1), scales.to(tl.uint8)
        NUM: tl.constexpr = 4 * ROW.num_scales
    else:
        to, scales = words_at(place + ROW.scales_at, 4), scales.to(tl.int32, bitcast=True)
        NUM: tl.constexpr = ROW.num_scales
    store_piece(to, nth, scales, wanted, NUM, PER_PIECE)
