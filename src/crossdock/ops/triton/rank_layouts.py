"""Counting where the tokens of a rank go, in Triton: what `routing.dispatch_layout` says.

T tokens here, K top-k, E experts, R ranks, L experts of a rank.

Example (2 ranks, 4 experts): topk_idx=[[0,1],[1,3],[-1,-1]] -> per_rank=[2,1],
    per_expert=[1,2,0,1], in_rank=[[1,0],[1,1],[0,0]]
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from crossdock.ops.triton.links import Address, words_at

__all__ = ["Choices", "LayoutOf", "lay_out_tokens"]


class Choices(NamedTuple):
    """What is chosen from, as constants of a kernel.

    Attributes:
        num_topk, padded_topk: K.
        experts, bins: E, and a power of two above it.
        local: L.
        ranks, padded_ranks: R.
        tokens: tokens of a program, a power of two.
    """

    num_topk: int
    padded_topk: int
    experts: int
    bins: int
    local: int
    ranks: int
    padded_ranks: int
    tokens: int


class LayoutOf(NamedTuple):
    """Where the choices are, and where the results go.

    Attributes:
        topk_idx: [T, K] int64.
        per_rank, per_expert: [R] and [E] int32, zero.
        in_rank: [T, R] bool.
        num_tokens: T.
    """

    topk_idx: Address
    per_rank: Address
    per_expert: Address
    in_rank: Address
    num_tokens: int


@triton.jit
def lay_out_tokens(of, C: tl.constexpr):
    """Count the choices of some tokens, and say to which ranks each goes; see the module."""
    token = tl.program_id(0) * C.tokens + tl.arange(0, C.tokens)
    slot, rank = tl.arange(0, C.padded_topk), tl.arange(0, C.padded_ranks)
    real = token < of.num_tokens
    words = words_at(of.topk_idx, 8) + token[:, None] * C.num_topk + slot[None, :]
    ids = tl.load(words, mask=real[:, None] & (slot < C.num_topk)[None, :], other=-1)
    known = (ids >= 0) & (ids < C.experts)
    counted = tl.where(known, ids, C.bins - 1).to(tl.int32)
    found = tl.histogram(tl.reshape(counted, [C.tokens * C.padded_topk]), C.bins)
    expert = tl.arange(0, C.bins)
    wanted = (expert < C.experts) & (found > 0)
    tl.atomic_add(words_at(of.per_expert, 4) + expert, found, mask=wanted, sem="relaxed")
    owner = tl.where(known, ids // C.local, -1).to(tl.int32)
    goes = (token[:, None] < 0) & (rank[None, :] < 0)
    K: tl.constexpr = C.num_topk
    for k in tl.static_range(K):
        this = tl.sum(tl.where(slot[None, :] == k, owner, 0), 1)
        goes = goes | (this[:, None] == rank[None, :])
    is_rank = (rank < C.ranks)[None, :]
    words = words_at(of.in_rank, 1) + token[:, None] * C.ranks + rank[None, :]
    tl.store(words, goes.to(tl.uint8), mask=real[:, None] & is_rank)
    num = tl.sum(goes.to(tl.int32), 0)
    tl.atomic_add(words_at(of.per_rank, 4) + rank, num, mask=rank < C.ranks, sem="relaxed")
