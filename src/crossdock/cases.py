"""Routings that hold every awkward case, and rows that name where they come from.

Tests, the demo and the benchmark draw from the same cases, so that each is written once. How the
ranks that use them run is the matter of `worlds`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ROUTING_CASES",
    "Routing",
    "RoutingCase",
    "choose",
    "origin_rows",
    "origin_rows_fp8",
]


class Routing(NamedTuple):
    """What every rank's tokens choose, `[T, K]` int64 with -1 = none, among how many experts."""

    topk_idxs: list[Tensor]
    num_experts: int


@dataclass(frozen=True)
class RoutingCase:
    """One way in which tokens choose experts.

    Attributes:
        what: The case in a few words.
        num_tokens: T of rank 0, of rank 1 and so on, from the front again when it ends.
        num_topk: K; all experts, where there are fewer.
        num_local: Experts of each rank.
        change: (`topk_idx` of different experts, some of its slots) -> `topk_idx`.
    """

    what: str
    num_tokens: tuple[int, ...] = (16,)
    num_topk: int = 3
    num_local: int = 4
    change: Callable[[Tensor, Tensor], Tensor] = lambda idx, _: idx

    def make(self, num_ranks: int, seed: int = 0) -> Routing:
        """Draw the case for `num_ranks` ranks; the same seed gives the same routing."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        num_experts = self.num_local * num_ranks
        topk_idxs = []
        for rank in range(num_ranks):
            num_tokens = self.num_tokens[rank % len(self.num_tokens)]
            drawn = choose(num_tokens, num_experts, self.num_topk, generator=generator)
            some = _noise(num_tokens, drawn.shape[1], generator) < 0.4
            topk_idxs.append(self.change(drawn, some))
        return Routing(topk_idxs, num_experts)


def choose(
    num_tokens: int, num_experts: int, num_topk: int, *, generator: torch.Generator
) -> Tensor:
    """Draw `num_topk` different experts for each token: `[T, K]` int64."""
    order = _noise(num_tokens, num_experts, generator).argsort(dim=1)
    return order[:, :num_topk].contiguous()


def _noise(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.rand((rows, columns), generator=generator, dtype=torch.float32, device="cpu")


ROUTING_CASES: Mapping[str, RoutingCase] = MappingProxyType(
    {
        "uniform": RoutingCase("every rank has the same number of tokens"),
        "uneven": RoutingCase("token counts differ", (3, 42, 1, 17)),
        "one_rank_empty": RoutingCase("one rank has no token", (9, 0, 9, 9)),
        "nobody": RoutingCase("nobody has a token", (0,)),
        "all_to_one": RoutingCase(
            "one expert for all", change=lambda idx, _: torch.full_like(idx, 2)
        ),
        "slots_empty": RoutingCase(
            "-1 anywhere", change=lambda idx, some: idx.masked_fill(some, -1)
        ),
        "tokens_empty": RoutingCase(
            "tokens choose nothing", change=lambda idx, some: idx.masked_fill(some[:, :1], -1)
        ),
        "duplicates": RoutingCase(
            "an expert named twice", change=lambda idx, some: idx.where(~some, idx[:, :1])
        ),
        "all_experts": RoutingCase("K = E", num_topk=sys.maxsize, num_local=3),
        "one_choice": RoutingCase("K = 1", num_topk=1),
    }
)
"""The cases that every test of routing goes through."""


def origin_rows(rank: int, num_tokens: int, hidden: int, *, dtype: torch.dtype) -> Tensor:
    """Make rows that name their origin: `[T, H]`, exact in bfloat16, float16 and wider.

    The columns repeat three digits, t % 128, t // 128 and rank, each plus one. Every second three
    is negative, each six twice the last (seven times over): no columns change places unseen.

    Example: `origin_rows(5, 3, 7, dtype=torch.bfloat16)[2]` is `[3, 1, 6, -3, -1, -6, 6]`.

    Args:
        rank: The rank that owns the rows, below 128.
        num_tokens: T, at most 16384.
        hidden: H; from three on, no two rows of a world are alike.
        dtype: A floating type with eight bits of significand or more.
    """
    digits = _digits(rank, num_tokens, hidden) + 1
    group = torch.arange(hidden, dtype=torch.int64, device="cpu") // 3
    return (digits * (1 - 2 * (group % 2)) * (1 << (group // 2).clamp(max=7))).to(dtype)


def origin_rows_fp8(
    rank: int, num_tokens: int, hidden: int, *, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Make quantised rows that name their origin: `([T, H] float8_e4m3fn, [T, ceil(H / 128)])`.

    The bytes of the payload are the digits of `origin_rows` in base 120 (no byte stands for NaN),
    negative in every second group of three. The scales, float32 or int32 (packed exponents, to
    whoever reads them), are `origin_rows` of their own width.
    """
    group = torch.arange(hidden, dtype=torch.int64, device="cpu") // 3
    codes = _digits(rank, num_tokens, hidden, base=120) + 128 * (group % 2)
    scales = origin_rows(rank, num_tokens, -(-hidden // 128), dtype=scale_dtype)
    return codes.to(torch.uint8).view(torch.float8_e4m3fn), scales


def _digits(rank: int, num_tokens: int, hidden: int, *, base: int = 128) -> Tensor:
    token = torch.arange(num_tokens, dtype=torch.int64, device="cpu")
    columns = torch.stack([token % base, token // base, torch.full_like(token, rank)], dim=1)
    return columns.repeat(1, -(-hidden // 3))[:, :hidden]
