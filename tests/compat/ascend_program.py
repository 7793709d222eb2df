"""A program in the shape of DeepEP-Ascend's low-latency test: it checks itself as it goes.

Written for rows of int8 with one scale each, back to back without slabs, and calls by keyword. Two
arguments of the constructor say so; the rest is as it was. Nothing else here knows crossdock.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from deep_ep import Buffer
from deep_ep.utils.math import hash_tensor

NUM_EXPERTS_PER_RANK = 4
NUM_TOPK = 6
LAST_COLUMNS = 128
MARK_OFFSET = 128
BOUNDS = {True: 1e-4, False: 1e-5}
"""By `use_fp8`, which means int8."""


class Received(NamedTuple):
    """What a dispatch brought: rows of all experts back to back, and their scales if any."""

    data: torch.Tensor
    scales: torch.Tensor | None
    counts: torch.Tensor
    handle: Any


class Program:
    """The test of one rank.

    Args:
        num_tokens: of this rank.
        max_tokens: of the rank with most.
        num_active: ranks whose experts are chosen; the others receive nothing.
        drop: share of the choices that are left out.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        num_tokens: int,
        max_tokens: int,
        hidden: int,
        num_active: int,
        drop: float,
    ) -> None:
        self.group, self.rank, self.num_ranks = group, group.rank(), group.size()
        self.num_tokens, self.max_tokens, self.hidden = num_tokens, max_tokens, hidden
        self.num_experts = NUM_EXPERTS_PER_RANK * self.num_ranks
        num_rdma_bytes = Buffer.get_low_latency_rdma_size_hint(
            max_tokens, hidden, self.num_ranks, self.num_experts
        )
        self.buffer = Buffer(
            group,
            num_rdma_bytes=num_rdma_bytes,
            low_latency_mode=True,
            num_qps_per_rank=self.num_experts // self.num_ranks,
            low_latency_format="int8",
            low_latency_rows="compact",
        )
        self.generator = torch.Generator().manual_seed(self.rank)
        self.make_tokens()
        self.make_choices(num_active * NUM_EXPERTS_PER_RANK, drop)

    def make_tokens(self) -> None:
        origins = [(self.rank, token) for token in range(self.num_tokens)]
        self.marked = make_marked(origins, self.hidden)
        self.random = self.draw(self.num_tokens, self.hidden).bfloat16()

    def make_choices(self, num_chosen: int, drop: float) -> None:
        scores = self.draw(self.num_tokens, num_chosen).abs()
        self.topk_idx = torch.topk(scores, min(NUM_TOPK, num_chosen), dim=-1).indices
        size = tuple(self.topk_idx.shape)
        dropped = torch.rand(size, generator=self.generator, dtype=torch.float32) < drop
        self.topk_idx = self.topk_idx.masked_fill(dropped, -1)
        self.topk_weights = self.draw(*size).abs()
        everyone: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(everyone, self.topk_idx, group=self.group)
        self.all_topk_idx: list[torch.Tensor] = everyone

    def draw(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self.generator, dtype=torch.float32)

    def run(self) -> tuple[int, int]:
        """Rounds passed and a sum of all bytes received, once everything came twice alike."""
        hashes, num_rounds = [], 0
        for _ in range(2):
            hash_value = 0
            for x, use_fp8, use_hook in itertools.product(
                (self.marked, self.random), (True, False), (False, True)
            ):
                got = self.check_round(x, use_fp8=use_fp8, use_hook=use_hook)
                hash_value = (hash_value * 31 + got) % 2**61
                num_rounds += 1
            hashes.append(hash_value ^ self.check_experts())
        assert hashes[0] == hashes[1]
        return num_rounds, hashes[0]

    def check_round(self, x: torch.Tensor, *, use_fp8: bool, use_hook: bool) -> int:
        received = self.dispatch(x, use_fp8=use_fp8, use_hook=use_hook)
        self.check_received(received)
        rows = received.data.float()
        if received.scales is not None:
            rows = rows * received.scales.view(-1, 1)
        if x is self.marked:
            self.check_rows(received)
        combined = self.combine(rows.bfloat16(), received, use_hook=use_hook)
        weights = self.topk_weights.masked_fill(self.topk_idx == -1, 0).sum(dim=1, keepdim=True)
        assert not bool(torch.isnan(combined).any())
        assert calc_diff(x.float() * weights, combined) < BOUNDS[use_fp8]
        return hash_tensor(combined) ^ hash_tensor(received.data[: int(received.counts.sum())])

    def dispatch(self, x: torch.Tensor, *, use_fp8: bool, use_hook: bool) -> Received:
        stats = torch.zeros((NUM_EXPERTS_PER_RANK,), dtype=torch.int)
        recv_x, counts, handle, event, hook = self.buffer.low_latency_dispatch(
            x=x,
            topk_idx=self.topk_idx,
            num_max_dispatch_tokens_per_rank=self.max_tokens,
            num_experts=self.num_experts,
            cumulative_local_expert_recv_stats=stats,
            use_fp8=use_fp8,
            round_scale=False,
            use_ue8m0=False,
            async_finish=not use_hook,
            return_recv_hook=use_hook,
        )
        if use_hook:
            hook()
        else:
            event.current_stream_wait()
        assert torch.equal(stats, counts)
        data, scales = recv_x if use_fp8 else (recv_x, None)
        return Received(data, scales, counts, handle)

    def check_received(self, received: Received) -> None:
        """Shapes, the six parts of the handle, and the number of rows of each expert."""
        _, _, max_tokens, hidden, num_experts, packed_recv_count = received.handle
        assert (max_tokens, hidden, num_experts) == (self.max_tokens, self.hidden, self.num_experts)
        assert torch.equal(packed_recv_count, received.counts)
        width = min(self.topk_idx.shape[1], NUM_EXPERTS_PER_RANK)
        num_rows = self.max_tokens * self.num_ranks * width
        assert tuple(received.data.shape) == (num_rows, self.hidden)
        if received.scales is not None:
            assert (received.data.dtype, received.scales.dtype) == (torch.int8, torch.float32)
            assert tuple(received.scales.shape) == (num_rows,)
        first = self.rank * NUM_EXPERTS_PER_RANK
        for expert, count in enumerate(received.counts.tolist()):
            assert count == sum(int((idx == first + expert).sum()) for idx in self.all_topk_idx)

    def check_rows(self, received: Received) -> None:
        """Rows lie by expert, inside by source rank, inside by token, without gaps."""
        first = self.rank * NUM_EXPERTS_PER_RANK
        origins = [
            (source, token)
            for expert in range(first, first + NUM_EXPERTS_PER_RANK)
            for source, idx in enumerate(self.all_topk_idx)
            for token in (idx == expert).any(dim=1).nonzero().flatten().tolist()
        ]
        assert len(origins) == int(received.counts.sum())
        rows = make_marked(origins, self.hidden)
        if received.scales is None:
            assert torch.equal(received.data[: len(origins)], rows)
            return
        data, scales = quantise(rows)
        assert torch.equal(received.data[: len(origins)], data)
        assert torch.equal(received.scales[: len(origins)], scales)

    def combine(self, rows: torch.Tensor, received: Received, *, use_hook: bool) -> torch.Tensor:
        """Rows beyond those received hold NaN."""
        rows[int(received.counts.sum()) :] = float("nan")
        combined, event, hook = self.buffer.low_latency_combine(
            x=rows,
            topk_idx=self.topk_idx,
            topk_weights=self.topk_weights,
            handle=received.handle,
            zero_copy=False,
            async_finish=not use_hook,
            return_recv_hook=use_hook,
            out=None,
        )
        if use_hook:
            hook()
        else:
            event.current_stream_wait()
        return combined

    def check_experts(self) -> int:
        """A grouped matmul of int8 rows, against every token's own experts."""
        received = self.dispatch(self.random, use_fp8=True, use_hook=True)
        matrices, scales = make_matrices(self.num_experts, self.hidden)
        mine = slice(self.rank * NUM_EXPERTS_PER_RANK, (self.rank + 1) * NUM_EXPERTS_PER_RANK)
        rows = grouped_matmul(received, matrices[mine], scales[mine])
        combined = self.combine(rows, received, use_hook=True)
        data, row_scales = quantise(self.random)
        expected = torch.zeros((self.num_tokens, self.hidden), dtype=torch.float64)
        for expert in range(self.num_experts):
            weights = (self.topk_weights * (self.topk_idx == expert)).sum(dim=1, keepdim=True)
            products = data.double() @ matrices[expert].double() * scales[expert].double()
            expected += weights.double() * products * row_scales.double().view(-1, 1)
        assert calc_diff(expected, combined) < BOUNDS[False]
        return hash_tensor(combined)


def make_marked(origins: list[tuple[int, int]], hidden: int) -> torch.Tensor:
    """A row for each (rank, token): a number for the rank, in the last columns the token's."""
    numbers = torch.tensor(origins, dtype=torch.float32).view(-1, 2)
    rows = (numbers[:, :1] - MARK_OFFSET).repeat(1, hidden)
    rows[:, -LAST_COLUMNS:] = numbers[:, 1:]
    return rows.bfloat16()


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What travels: int8 and one scale for a row."""
    rows = x.float()
    amax = rows.abs().amax(dim=1)
    factors = torch.full_like(amax, 127) / amax  # 127 / amax would round twice
    return (rows * factors.view(-1, 1)).round().to(torch.int8), factors.reciprocal()


def make_matrices(num_experts: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`[E, H, H]` int8 and a scale for each column, `[E, H]`; the same on all ranks."""
    generator = torch.Generator().manual_seed(7)
    size = (num_experts, hidden, hidden)
    matrices = torch.randint(-127, 128, size, generator=generator, dtype=torch.int8)
    scales = torch.rand((num_experts, hidden), generator=generator, dtype=torch.float32) + 0.5
    return matrices, scales * (hidden**-0.5 / 64)


def grouped_matmul(
    received: Received, matrices: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """The counts are the group list: rows of expert `i` times its matrix, in int32, to bf16."""
    out = torch.empty(received.data.shape, dtype=torch.bfloat16)
    begin = 0
    for i, count in enumerate(received.counts.to(torch.int64).tolist()):
        part = slice(begin, begin + count)
        products = received.data[part].int() @ matrices[i].int()
        out[part] = (products * scales[i] * received.scales[part].view(-1, 1)).bfloat16()
        begin += count
    return out


def calc_diff(x: torch.Tensor, y: torch.Tensor) -> float:
    """As DeepEP-Ascend compares: one is added to every element, so that zeros count."""
    x, y = x.double() + 1, y.double() + 1
    return (1 - 2 * (x * y).sum() / (x * x + y * y).sum()).item() if x.numel() else 0.0


def run(
    group: dist.ProcessGroup, num_tokens: list[int], hidden: int, num_active: int, drop: float
) -> tuple[int, int]:
    """One rank, in a world that somebody else has made."""
    return Program(
        group,
        num_tokens=num_tokens[group.rank()],
        max_tokens=max(1, *num_tokens),
        hidden=hidden,
        num_active=num_active,
        drop=drop,
    ).run()
