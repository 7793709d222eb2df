"""From top-k ids to who sends what to whom.

`dispatch_layout` is what a rank knows of its own tokens; `RoutingTable` is what every rank knows
of all tokens once the shares have been exchanged. Where rows will lie is decided in `layouts`.

T tokens of a rank, S tokens of all ranks together, K top-k, E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch

from crossdock.errors import ShapeError
from crossdock.topology import num_local_experts

__all__ = [
    "DispatchLayout",
    "RoutingShare",
    "RoutingTable",
    "Selection",
    "SelectionTable",
    "ShareShape",
    "check_expert_ids",
    "dispatch_layout",
]


@dataclass(frozen=True)
class DispatchLayout:
    """What one rank's tokens ask for.

    Attributes:
        num_tokens_per_rank: [R] int32, tokens that go to each rank, once per (token, rank).
        num_tokens_per_expert: [E] int32, selections of each expert, every occurrence counted.
        is_token_in_rank: [T, R] bool, whether a token goes to a rank.
    """

    num_tokens_per_rank: torch.Tensor
    num_tokens_per_expert: torch.Tensor
    is_token_in_rank: torch.Tensor


def dispatch_layout(topk_idx: torch.Tensor, num_experts: int, num_ranks: int) -> DispatchLayout:
    """Count where tokens go.

    Args:
        topk_idx: [T, K] integer expert ids; -1 selects nothing.
        num_experts: experts of the whole group.
        num_ranks: ranks of the group.

    Raises:
        ShapeError: the experts do not divide over the ranks, or (on CPU, where looking is free)
            an id is not below `num_experts`.

    Example (2 ranks, 4 experts): topk_idx=[[0,1],[1,3],[-1,-1]] ->
        tokens per rank [2,1], per expert [1,2,0,1], in rank [[1,0],[1,1],[0,0]]
    """
    experts_here = num_local_experts(num_experts, num_ranks)
    check_expert_ids(topk_idx, num_experts)
    none = topk_idx < 0
    owner = torch.where(none, num_ranks, topk_idx // experts_here).long()
    in_rank = torch.zeros(
        (topk_idx.shape[0], num_ranks + 1), dtype=torch.bool, device=topk_idx.device
    )
    in_rank = in_rank.scatter_(1, owner, True)[:, :num_ranks].contiguous()
    expert = torch.where(none, num_experts, topk_idx).flatten().long()
    per_expert = torch.bincount(expert, minlength=num_experts + 1)[:num_experts]
    return DispatchLayout(in_rank.sum(0, dtype=torch.int32), per_expert.int(), in_rank)


def check_expert_ids(topk_idx: torch.Tensor, num_experts: int) -> None:
    """Raise `ShapeError` if an id is not below `num_experts`; on CPU, where looking is free."""
    if topk_idx.is_cpu and topk_idx.numel():
        highest = int(topk_idx.max())
        if highest >= num_experts:
            raise ShapeError(
                "topk_idx", got=f"expert {highest}", expected=f"ids below {num_experts}, or -1"
            )


@dataclass(frozen=True)
class RoutingShare:
    """What one rank tells the others about its tokens.

    Attributes:
        is_token_in_rank: [T, R] bool.
        num_tokens_per_expert: [E] int32.
        topk_idx: [T, K] int32 or int64, or None when the call names no experts.
        topk_weights: [T, K] float32, or None.
    """

    is_token_in_rank: torch.Tensor
    num_tokens_per_expert: torch.Tensor
    topk_idx: torch.Tensor | None = None
    topk_weights: torch.Tensor | None = None

    def owned(self) -> RoutingShare:
        """The same with ids as int32."""
        return replace(self, topk_idx=None if self.topk_idx is None else self.topk_idx.int())

    def to_bytes(self) -> torch.Tensor:
        """The share, with ids as int32, as one uint8 tensor: ids, weights, counts, presence."""
        parts = (self.topk_idx, self.topk_weights, self.num_tokens_per_expert)
        words = [
            part.contiguous().flatten().view(torch.uint8) for part in parts if part is not None
        ]
        return torch.cat([*words, self.is_token_in_rank.contiguous().flatten().view(torch.uint8)])

    @classmethod
    def from_bytes(
        cls,
        raw: torch.Tensor,
        *,
        num_tokens: int,
        num_ranks: int,
        num_experts: int,
        shape: ShareShape,
    ) -> RoutingShare:
        """Read a share back; `raw` must start on a 4-byte boundary of its storage."""
        words = _Reader(raw)
        slots = (num_tokens, shape.num_topk)
        topk_idx = words.take(torch.int32, slots) if shape.has_topk else None
        weights = words.take(torch.float32, slots) if shape.has_weights else None
        per_expert = words.take(torch.int32, (num_experts,))
        in_rank = words.take(torch.bool, (num_tokens, num_ranks))
        return cls(in_rank, per_expert, topk_idx, weights)


@dataclass(frozen=True)
class ShareShape:
    """Which optional parts a share has: the same on all ranks of a call."""

    num_topk: int
    has_topk: bool
    has_weights: bool


class _Reader:
    """Takes typed tensors off the front of a byte tensor."""

    def __init__(self, raw: torch.Tensor) -> None:
        self._raw = raw
        self._at = 0

    def take(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        count = dtype.itemsize
        for length in shape:
            count *= length
        piece = self._raw[self._at : self._at + count]
        self._at += count
        return piece.view(dtype).view(shape)


@dataclass(frozen=True)
class RoutingTable:
    """Every rank's routing, tokens of all ranks one after another.

    Row `token_offsets[s] + t` is token `t` of rank `s`, so reading the table from top to bottom
    visits tokens by source rank, then by token: the order of the rank-major layout.

    Attributes:
        token_offsets: R + 1 host integers.
        is_token_in_rank: [S, R] bool.
        num_tokens_per_expert: [R, E] int32, one row per source rank.
        topk_idx: [S, K] int32 or None.
        topk_weights: [S, K] float32 or None.
    """

    token_offsets: tuple[int, ...]
    is_token_in_rank: torch.Tensor
    num_tokens_per_expert: torch.Tensor
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None

    @classmethod
    def from_shares(cls, shares: Sequence[RoutingShare]) -> RoutingTable:
        """Join the shares of all ranks, in rank order. Copies them."""
        lengths = (share.is_token_in_rank.shape[0] for share in shares)
        return cls(
            tuple(accumulate(lengths, initial=0)),
            torch.cat([share.is_token_in_rank for share in shares]),
            torch.stack([share.num_tokens_per_expert for share in shares]),
            _cat_or_none(share.topk_idx for share in shares),
            _cat_or_none(share.topk_weights for share in shares),
        )


class Selection(NamedTuple):
    """The share of a low-latency call: the choices of one rank's tokens, and nothing else.

    Attributes:
        topk_idx: [T, K] int32 or int64, -1 for none.
        topk_weights: [T, K] float32, or None.
    """

    topk_idx: torch.Tensor
    topk_weights: torch.Tensor | None = None

    def owned(self) -> Selection:
        """The same as int32, in memory of its own."""
        weights = None if self.topk_weights is None else self.topk_weights.detach().clone()
        return Selection(self.topk_idx.to(torch.int32, copy=True), weights)

    def to_bytes(self) -> torch.Tensor:
        """The share of an owned selection as one uint8 tensor: ids, weights."""
        parts = (self.topk_idx, self.topk_weights)
        words = [
            part.contiguous().flatten().view(torch.uint8) for part in parts if part is not None
        ]
        return torch.cat(words)

    @classmethod
    def from_bytes(
        cls, raw: torch.Tensor, *, num_tokens: int, num_topk: int, has_weights: bool
    ) -> Selection:
        """Read a share back; `raw` must start on a 4-byte boundary of its storage."""
        words, slots = _Reader(raw), (num_tokens, num_topk)
        topk_idx = words.take(torch.int32, slots)
        return cls(topk_idx, words.take(torch.float32, slots) if has_weights else None)

    @property
    def num_bytes(self) -> int:
        """Length of the share."""
        parts = (self.topk_idx, self.topk_weights)
        return sum(part.numel() * part.itemsize for part in parts if part is not None)

    def has_weights_of(self, other: Selection) -> bool:
        """Whether both have the same bits as weights; looked at only on CPU, where it is free."""
        mine, theirs = self.topk_weights, other.topk_weights
        if mine is None or theirs is None:
            return mine is theirs
        bits = [each.contiguous().view(torch.int32) for each in (mine, theirs)]
        return mine.device.type != "cpu" or torch.equal(*bits)

    def is_token_in_rank(self, num_experts: int, num_ranks: int) -> torch.Tensor:
        """[T, R] bool: whether a token chose an expert of a rank."""
        return dispatch_layout(self.topk_idx, num_experts, num_ranks).is_token_in_rank


@dataclass(frozen=True)
class SelectionTable:
    """Every rank's choices, tokens of all ranks one after another.

    Attributes:
        topk_idx: [S, K] int64.
        topk_weights: [S, K] float32, or None.
        src_rank: [S] int64, whose token a row is.
        src_token: [S] int64, its index there.
        num_ranks: ranks of the group.
    """

    topk_idx: torch.Tensor
    topk_weights: torch.Tensor | None
    src_rank: torch.Tensor
    src_token: torch.Tensor
    num_ranks: int

    @classmethod
    def of(cls, selections: Sequence[Selection]) -> SelectionTable:
        """Join the choices of all ranks, in rank order. Copies them."""
        idx = torch.cat([each.topk_idx for each in selections]).long()
        lengths = [each.topk_idx.shape[0] for each in selections]
        ranks = torch.arange(len(lengths), device=idx.device)
        src_rank = ranks.repeat_interleave(torch.tensor(lengths, device=idx.device))
        tokens = [torch.arange(length, device=idx.device) for length in lengths]
        weights = _cat_or_none(each.topk_weights for each in selections)
        return cls(idx, weights, src_rank, torch.cat(tokens), len(lengths))

    def without(self, ranks: Collection[int]) -> SelectionTable:
        """The same, as if these ranks had chosen nothing."""
        if not ranks:
            return self
        gone = torch.tensor(sorted(ranks), device=self.src_rank.device)
        lost = torch.isin(self.src_rank, gone).unsqueeze(1)
        return replace(self, topk_idx=self.topk_idx.masked_fill(lost, -1))

    def row_of(self, src_rank: torch.Tensor, src_token: torch.Tensor) -> torch.Tensor:
        """The rows of the table that tokens are."""
        lengths = torch.bincount(self.src_rank, minlength=self.num_ranks)
        return (lengths.cumsum(0) - lengths)[src_rank] + src_token

    def local(self, rank: int, experts_here: int) -> torch.Tensor:
        """[S, K] int64: the local index of each chosen expert of `rank`, -1 for other choices."""
        local = self.topk_idx - rank * experts_here
        return local.masked_fill((local < 0) | (local >= experts_here), -1)


def _cat_or_none(parts: Iterator[torch.Tensor | None]) -> torch.Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None
