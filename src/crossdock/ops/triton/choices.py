"""Counting choices of experts, in Triton: how many tokens choose one, and how many earlier ones do.

A token that names an expert twice counts once. `E` is `expert_rows.Experts`.

T tokens here, K top-k.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.ops.triton.links import words_at

__all__ = ["count_choices", "count_earlier"]


@triton.jit
def load_choices(topk_idx, tokens, num_tokens, E: tl.constexpr):
    """The expert ids of tokens, -1 for none: [N, K] int32."""
    slot = tl.arange(0, E.padded_topk)
    real = (tokens < num_tokens)[:, None] & (slot < E.num_topk)[None, :]
    words = words_at(topk_idx, 8) + tokens[:, None] * E.num_topk + slot[None, :]
    return tl.load(words, mask=real, other=-1).to(tl.int32)


@triton.jit
def is_repeated(ids, E: tl.constexpr):
    """Which choices name an expert that an earlier choice of the same token names: [N, K]."""
    slot = tl.arange(0, E.padded_topk)[None, :]
    found = ids < -1
    K: tl.constexpr = E.num_topk
    for k in tl.static_range(K):
        this = tl.sum(tl.where(slot == k, ids, 0), 1)
        found = found | ((ids == this[:, None]) & (slot > k))
    return found


@triton.jit
def count_choices(topk_idx, num_tokens, E: tl.constexpr):
    """How many tokens choose each expert: [bins] int32.

    All choices are on their way at once, but counted in parts, which takes fewer registers.
    """
    total = tl.zeros([E.bins], tl.int32)
    PART: tl.constexpr = max(E.tokens // 4, 1)
    NUM: tl.constexpr = E.tokens // PART
    for begin in range(0, num_tokens, E.tokens):
        parts = ()
        for nth in tl.static_range(NUM):
            tokens = begin + nth * PART + tl.arange(0, PART)
            parts += (load_choices(topk_idx, tokens, num_tokens, E),)
        for nth in range(NUM):
            ids = parts[0]
            for other in tl.static_range(1, NUM):
                ids = tl.where(nth == other, parts[other], ids)
            counts = (ids >= 0) & (is_repeated(ids, E) == 0)
            total += tl.histogram(tl.ravel(ids), E.bins, mask=tl.ravel(counts))
    return total


@triton.jit
def count_earlier(topk_idx, token, E: tl.constexpr):
    """For each choice of a token, how many tokens before it choose the same: [K] int32.

    Four counts are summed as the bytes of one number, so there are at most 128 tokens at a time. Of
    a choice of none the count means nothing.
    """
    slot, nth = tl.arange(0, E.padded_topk), tl.arange(0, E.tokens)
    total = tl.zeros([E.padded_topk], tl.int32)
    mine = words_at(topk_idx, 8) + token * E.num_topk
    for begin in range(0, token, E.tokens):
        theirs = load_choices(topk_idx, begin + nth, token, E)
        K: tl.constexpr = E.num_topk
        for group in tl.static_range(0, K, 4):
            same = tl.zeros([E.tokens, E.padded_topk], tl.int32)
            for k in tl.static_range(group, min(group + 4, K)):
                is_same = theirs == tl.load(mine + k).to(tl.int32)
                same = same | (is_same.to(tl.int32) << (8 * (k - group)))
            once = ((tl.sum(same, 1) + 0x7F7F7F7F) >> 7) & 0x01010101
            found = (tl.sum(once.to(tl.uint32), 0) >> (8 * (slot % 4)).to(tl.uint32)) & 0xFF
            total += tl.where(slot // 4 == group // 4, found.to(tl.int32), 0)
    return total
