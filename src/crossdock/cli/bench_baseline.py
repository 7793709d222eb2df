"""The baselines of the benchmark: expert parallelism written out with `torch.distributed`.

This is what a program does without a library. A token crosses once per rank that wants it, counts
are exchanged first, choices travel beside the rows, and returning rows are summed in fp32. The
plain one is made of `all_to_all_single` and index operations on fresh tensors; the tuned one keeps
its memory between calls and sums with one fused operation, which for bf16 rounds ties upwards.
They share no code with what they are compared to, and are judged by the same oracle.

Letters: R ranks, T tokens here, K choices a token, H hidden, E experts, S rows sent, N received.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock.cli.bench_world import Contender

__all__ = ["GlooBaseline", "Received", "Route", "TunedGlooBaseline"]


class Route(NamedTuple):
    """What the way back needs.

    Attributes:
        token: `[S]` int64, the token of each row sent, by destination rank, then token.
        is_token_in_rank: `[T, R]` bool.
        num_sent: Rows sent to each rank.
        num_received: Rows received from each rank.
    """

    token: Tensor
    is_token_in_rank: Tensor
    num_sent: list[int]
    num_received: list[int]


class Received(NamedTuple):
    """What a rank has after dispatch.

    Attributes:
        x: `[N, H]`, by source rank, then token.
        topk_idx: `[N, K]` int64, local expert, -1 where the slot is another rank's.
        topk_weights: `[N, K]` float32, 0 where the slot is another rank's.
        num_tokens_per_expert: Rows of each local expert.
        route: For `combine`; what it holds is the contender's own matter.
    """

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    num_tokens_per_expert: list[int]
    route: Any


class GlooBaseline(Contender):
    """Dispatch and combine over one process group, with index operations.

    Args:
        group: Every rank of the world; gloo, or any backend that has `all_to_all_single`.
        num_experts: E, a multiple of R; expert `e` lives on rank `e // (E / R)`.

    Lifetime: results are the caller's.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self.group = group
        self.rank, self.num_ranks = group.rank(), group.size()
        self.num_local_experts = num_experts // self.num_ranks

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank {self.rank} of {self.num_ranks})"

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Received:
        """Sends each token to the ranks of its experts.

        **Collective**: every rank of the group. **Sync**: returns when the rows are there.

        Args:
            x: `[T, H]`, contiguous.
            topk_idx: `[T, K]` int64, -1 = none.
            topk_weights: `[T, K]` float32.
        """
        route = self._route(topk_idx)
        sent = self._rows(len(route.token), like=x)
        torch.index_select(x, 0, route.token, out=sent)
        choices = self._choices(topk_idx, topk_weights).index_select(0, route.token)
        total = sum(route.num_received)
        recv_x, recv_choices = (
            x.new_empty(total, x.size(1)),
            choices.new_empty(total, 2, topk_idx.size(1)),
        )
        self._exchange(
            [(recv_x, sent), (recv_choices, choices)], route.num_received, route.num_sent
        )
        return self._received(recv_x, recv_choices, route)

    def combine(self, x: Tensor, route: Route) -> Tensor:
        """Brings the rows back and sums each token's in rank order, in fp32, rounding once.

        **Collective**: every rank of the group. **Sync**: returns when the sums are there.

        Args:
            x: `[N, H]`, one row for each that dispatch gave, contiguous.
            route: What dispatch returned.
        """
        rows = self._rows(len(route.token), like=x)
        self._exchange([(rows, x)], route.num_sent, route.num_received)
        return self._sum(rows, route)

    def _route(self, topk_idx: Tensor) -> Route:
        presence = topk_idx.new_zeros((len(topk_idx), self.num_ranks + 1), dtype=torch.bool)
        owner = torch.where(topk_idx < 0, self.num_ranks, topk_idx // self.num_local_experts)
        presence = presence.scatter_(1, owner, True)[:, : self.num_ranks]
        token = presence.t().nonzero()[:, 1]
        num_sent = presence.sum(dim=0)
        num_received = torch.empty_like(num_sent)
        dist.all_to_all_single(num_received, num_sent, group=self.group)
        return Route(token, presence, num_sent.tolist(), num_received.tolist())

    def _rows(self, num_rows: int, *, like: Tensor) -> Tensor:
        """`[num_rows, H]` for rows on their way; only one at a time is in use."""
        return like.new_empty(num_rows, like.size(1))

    def _sum(self, rows: Tensor, route: Route) -> Tensor:
        """The sum of each token's rows, in the order they lie, in fp32."""
        num_tokens = len(route.is_token_in_rank)
        total = torch.zeros((num_tokens, rows.size(1)), dtype=torch.float32, device=rows.device)
        return total.index_add_(0, route.token, rows.float()).to(rows.dtype)

    def _choices(self, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        """Ids and the bits of the weights in one message: `[T, 2, K]` int32."""
        return torch.stack([topk_idx.to(torch.int32), topk_weights.view(torch.int32)], dim=1)

    def _exchange(
        self, pairs: list[tuple[Tensor, Tensor]], num_received: list[int], num_sent: list[int]
    ) -> None:
        """Moves each (received, sent) pair, all of them at the same time."""
        works = [
            dist.all_to_all_single(
                received, sent, num_received, num_sent, group=self.group, async_op=True
            )
            for received, sent in pairs
        ]
        for work in works:
            work.wait()

    def _received(self, x: Tensor, choices: Tensor, route: Route) -> Received:
        topk_idx = choices[:, 0].to(torch.int64) - self.rank * self.num_local_experts
        is_foreign = (topk_idx < 0) | (topk_idx >= self.num_local_experts)
        topk_idx.masked_fill_(is_foreign, -1)
        topk_weights = choices[:, 1].contiguous().view(torch.float32).masked_fill_(is_foreign, 0.0)
        counts = torch.bincount(topk_idx.flatten() + 1, minlength=self.num_local_experts + 1)
        return Received(x, topk_idx, topk_weights, counts[1:].tolist(), route)


class TunedGlooBaseline(GlooBaseline):
    """The same with what an engineer adds on a second day.

    Args:
        group: As above.
        num_experts: As above.

    Lifetime: the workspace for rows on their way grows and stays.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        super().__init__(group, num_experts)
        self._workspace = torch.empty(0, dtype=torch.uint8, device="cpu")

    def _rows(self, num_rows: int, *, like: Tensor) -> Tensor:
        num_bytes = num_rows * like.size(1) * like.element_size()
        if self._workspace.numel() < num_bytes:
            self._workspace = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
        return self._workspace[:num_bytes].view(like.dtype).view(num_rows, like.size(1))

    def _sum(self, rows: Tensor, route: Route) -> Tensor:
        num_rows = route.is_token_in_rank.sum(dim=1)
        order = route.token.argsort(stable=True)
        begins = num_rows.cumsum(0) - num_rows
        return torch.nn.functional.embedding_bag(order, rows, begins, mode="sum")
