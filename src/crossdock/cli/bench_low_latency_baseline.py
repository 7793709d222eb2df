"""The baselines of the low-latency benchmark: decoding written out with `torch.distributed`.

This is what a framework does without a library, on the way that `bench_baseline.py` goes. A token
is encoded with a few torch operations; payload and scales cross as one row, once per rank that
wants it, with ids and weights beside them. The receiver lays the rows out by expert with index
operations. On the way back it adds up, weighted and in fp32, what its experts have for a token, so
that again one row crosses per token and rank.

Results are those of the library, except that nothing is written down for other programs to read
(`src_info`, `layout_range`). Both are judged by the same oracle; they share no code.

Letters: R ranks, T tokens here, K choices a token, H hidden, L experts here, M tokens of a rank at
most, N rows received, P rows in slabs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock.cli.bench_baseline import GlooBaseline, Received, Route, TunedGlooBaseline
from crossdock.cli.bench_world import Contender

__all__ = ["GlooSlabs", "SlabRoute", "Slabs", "TunedGlooSlabs"]

_BLOCK = 128
_SUMS_AT_ONCE = 8


class Slabs(NamedTuple):
    """What a rank has after a low-latency dispatch.

    Attributes:
        payload: `[L, R * M, H]`, expert by expert: its rows by source rank, then token.
        scales: `[L, R * M, H / 128]` column-major for fp8, `[L, R * M]` for int8, None for bf16.
        recv_count: `[L]` int32, rows of each expert; what lies beyond them is undefined.
        route: For `combine`; what it holds is the contender's own matter.
    """

    payload: Tensor
    scales: Tensor | None
    recv_count: Tensor
    route: Any


class SlabRoute(NamedTuple):
    """What the way back needs: P terms, in the order in which they are added.

    Attributes:
        slots: `[P]` int64, where each term lies in the slabs.
        rows: `[P]` int64, ascending, the received row that it is a part of.
        weights: `[P]` float32.
        num_terms: `[N]` int64, terms of each received row.
        route: How the rows came.
    """

    slots: Tensor
    rows: Tensor
    weights: Tensor
    num_terms: Tensor
    route: Route


class GlooSlabs(Contender):
    """Dispatch into expert slabs, and the weighted way back, with index operations.

    Args:
        group: Every rank of the world.
        num_experts: E, a multiple of R.
        num_slots: M.
        form: "fp8", "int8" or "bf16".

    Lifetime: results are the caller's.
    """

    def __init__(
        self, group: dist.ProcessGroup, num_experts: int, *, num_slots: int, form: str
    ) -> None:
        self.carrier = self._carrier(group, num_experts)
        self.num_local = num_experts // group.size()
        self.slab_rows = group.size() * num_slots
        self.form = form

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.form}, over {self.carrier!r})"

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Slabs:
        """Sends each token, encoded, to the ranks of its experts, and lays it out there.

        **Collective**: every rank of the group. **Sync**: returns when the rows are there.

        Args:
            x: `[T, H]` bf16, contiguous.
            topk_idx: `[T, K]` int64, -1 = none.
            topk_weights: `[T, K]` float32.
        """
        received = self.carrier.dispatch(self._encoded(x), topk_idx, topk_weights)
        return self._laid_out(received, x.size(1))

    def combine(self, x: Tensor, route: SlabRoute) -> Tensor:
        """Adds up what the experts have for a token, here in fp32, then over the ranks.

        **Collective**: every rank of the group. **Sync**: returns when the sums are there.

        Args:
            x: `[L, R * M, H]` bf16, contiguous.
            route: What dispatch returned.
        """
        return self.carrier.combine(self._weighted_sums(x.flatten(0, 1), route), route.route)

    def _carrier(self, group: dist.ProcessGroup, num_experts: int) -> GlooBaseline:
        return GlooBaseline(group, num_experts)

    def _encoded(self, x: Tensor) -> Tensor:
        """Rows of bytes: the payload, and behind it the scales."""
        if self.form == "bf16":
            return x.view(torch.uint8)
        payload, scales = _fp8(x) if self.form == "fp8" else _int8(x)
        return torch.cat([payload.view(torch.uint8), scales.view(torch.uint8)], dim=1)

    def _laid_out(self, received: Received, hidden: int) -> Slabs:
        """Puts a copy of each row into the slab of every expert that wants it."""
        local, num_rows = received.topk_idx, len(received.x)
        wanted = local.new_zeros((num_rows, self.num_local + 1), dtype=torch.bool)
        wanted.scatter_(1, local.masked_fill(local < 0, self.num_local), True)
        expert, row = wanted[:, : self.num_local].t().nonzero().unbind(dim=1)
        count = torch.bincount(expert, minlength=self.num_local)
        place = torch.arange(len(expert), device=row.device) - (count.cumsum(0) - count)[expert]
        slots = expert * self.slab_rows + place
        payload, scales = self._filled(received.x.index_select(0, row), slots, hidden)
        slot_of = local.new_zeros((num_rows, self.num_local + 1))
        slot_of[row, expert] = slots
        route = self._route_back(slot_of, received)
        return Slabs(payload, scales, count.to(torch.int32), route)

    def _filled(self, encoded: Tensor, slots: Tensor, hidden: int) -> tuple[Tensor, Tensor | None]:
        """Fresh slabs with these rows of bytes in their slots."""
        element = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "bf16": torch.bfloat16}
        dtype = element[self.form]
        shape = (self.num_local, self.slab_rows, hidden)
        payload = torch.empty(shape, dtype=dtype, device=encoded.device)
        # In words of four bytes: torch moves bytes one by one.
        words = payload.view(torch.int32).flatten(0, 1)
        encoded = encoded.view(torch.int32)
        words.index_copy_(0, slots, encoded[:, : words.size(1)])
        if self.form == "bf16":
            return payload, None
        tail = encoded[:, words.size(1) :].contiguous().view(torch.float32)
        scales = tail.new_empty(self.num_local, tail.size(1), self.slab_rows).transpose(1, 2)
        scales[slots // self.slab_rows, slots % self.slab_rows] = tail
        return payload, scales if self.form == "fp8" else scales.squeeze(2)

    def _route_back(self, slot_of: Tensor, received: Received) -> SlabRoute:
        chosen = received.topk_idx >= 0
        slots = slot_of.gather(1, received.topk_idx.clamp(min=0))[chosen]
        rows = chosen.nonzero()[:, 0]
        weights = received.topk_weights[chosen]
        return SlabRoute(slots, rows, weights, chosen.sum(dim=1), received.route)

    def _weighted_sums(self, x: Tensor, route: SlabRoute) -> Tensor:
        """`[N, H]` bf16: of each row that came, the sum of its terms."""
        terms = x.index_select(0, route.slots).float().mul_(route.weights.unsqueeze(1))
        size = (len(route.num_terms), x.size(1))
        sums = torch.zeros(size, dtype=torch.float32, device=x.device)
        return sums.index_add_(0, route.rows, terms).to(x.dtype)


class TunedGlooSlabs(GlooSlabs):
    """The same with what an engineer adds on a second day, as in `TunedGlooBaseline`.

    Terms are widened and summed a few rows at a time, which then are still in a core's cache.
    """

    def _carrier(self, group: dist.ProcessGroup, num_experts: int) -> GlooBaseline:
        return TunedGlooBaseline(group, num_experts)

    def _weighted_sums(self, x: Tensor, route: SlabRoute) -> Tensor:
        num_rows = len(route.num_terms)
        ends = route.num_terms.cumsum(0)
        sums = x.new_empty(num_rows, x.size(1))
        starts = ends - route.num_terms
        for first in range(0, num_rows, _SUMS_AT_ONCE):
            here = slice(first, first + _SUMS_AT_ONCE)
            begin, end = int(starts[first]), int(ends[here][-1])
            terms = x.index_select(0, route.slots[begin:end]).float()
            sums[here] = torch.nn.functional.embedding_bag(
                torch.arange(end - begin, device=x.device),
                terms,
                starts[here] - begin,
                mode="sum",
                per_sample_weights=route.weights[begin:end],
            )
        return sums


def _fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Payload `[T, H]` e4m3 and scales `[T, H / 128]`."""
    blocks = x.view(x.size(0), x.size(1) // _BLOCK, _BLOCK).float()
    amax = blocks.abs().amax(dim=2).clamp_(min=1e-4)
    limit = torch.full_like(amax, 448.0)
    blocks *= (limit / amax).unsqueeze(2)
    return blocks.flatten(1).to(torch.float8_e4m3fn), amax / limit


def _int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Payload `[T, H]` int8 and scales `[T, 1]`; a row of zeros has scale 0."""
    widened = x.float()
    amax = widened.abs().amax(dim=1, keepdim=True)
    factor = torch.full_like(amax, 127.0) / amax
    widened *= factor.masked_fill(factor.isinf(), 0.0)
    return widened.round_().to(torch.int8), factor.reciprocal()
