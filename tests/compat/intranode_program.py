"""A program in the shape of DeepEP's own intranode test: it checks itself as it goes.

Rows of ones times the rank tell their source; random rows must come back as they went, times the
number of ranks they visited. Nothing here knows crossdock. Started by `python -m` it makes its own
processes; under torchrun it is one of them.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import deep_ep
from deep_ep.utils.envs import init_dist
from deep_ep.utils.math import (
    calc_diff,
    inplace_unique,
    per_token_cast_back,
    per_token_cast_to_fp8,
)
from deep_ep.utils.testing import bench

NUM_EXPERTS_PER_RANK = 4
NUM_TOPK = 3


class Batch(NamedTuple):
    """What one rank has to send, and what the world will receive."""

    num_tokens: int
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    random_weights: torch.Tensor
    num_tokens_per_rank: torch.Tensor
    num_tokens_per_expert: torch.Tensor
    is_token_in_rank: torch.Tensor
    received_per_rank: list[int]
    received_per_expert: list[list[int]]


class Program:
    """The test of one rank."""

    def __init__(self, group: dist.ProcessGroup, num_tokens: int, hidden: int) -> None:
        self.group, self.rank, self.num_ranks = group, group.rank(), group.size()
        self.num_experts = NUM_EXPERTS_PER_RANK * self.num_ranks
        self.generator = torch.Generator().manual_seed(self.rank)
        self.config = deep_ep.Config(24, 8, 256)
        hint = self.config.get_nvl_buffer_size_hint(hidden * 2, self.num_ranks)
        self.buffer = deep_ep.Buffer(
            group,
            hint,
            0,
            low_latency_mode=False,
            num_qps_per_rank=1,
            explicitly_destroy=True,
            allow_mnnvl=False,
            use_fabric=False,
        )
        self.batch = self.make_batch(num_tokens)
        size = (num_tokens, hidden)
        self.constant = torch.ones(size, dtype=torch.bfloat16) * self.rank
        self.random = torch.randn(size, generator=self.generator, dtype=torch.float32).bfloat16()

    def make_batch(self, num_tokens: int) -> Batch:
        scores = torch.randn(
            (num_tokens, self.num_experts), generator=self.generator, dtype=torch.float32
        )
        topk_idx = torch.topk(scores.abs() + 1, NUM_TOPK, dim=-1, sorted=False).indices
        topk_idx = topk_idx.to(deep_ep.topk_idx_t)
        size = (num_tokens, NUM_TOPK)
        rank_idx = topk_idx // NUM_EXPERTS_PER_RANK
        inplace_unique(rank_idx, self.num_ranks)
        ranks = torch.arange(self.num_ranks)
        experts = torch.arange(self.num_experts)
        is_token_in_rank = (rank_idx[:, :, None] == ranks).any(dim=1)
        num_tokens_per_rank = is_token_in_rank.sum(dim=0).to(torch.int32)
        num_tokens_per_expert = (topk_idx.flatten()[:, None] == experts).sum(dim=0).to(torch.int32)
        received_per_rank = num_tokens_per_rank.clone()
        received_per_expert = num_tokens_per_expert.clone()
        dist.all_reduce(received_per_rank, group=self.group)
        dist.all_reduce(received_per_expert, group=self.group)
        return Batch(
            num_tokens=num_tokens,
            topk_idx=topk_idx,
            topk_weights=torch.ones(size, dtype=torch.float32) * self.rank,
            random_weights=torch.randn(size, generator=self.generator, dtype=torch.float32),
            num_tokens_per_rank=num_tokens_per_rank,
            num_tokens_per_expert=num_tokens_per_expert,
            is_token_in_rank=is_token_in_rank,
            received_per_rank=received_per_rank.tolist(),
            received_per_expert=received_per_expert.view(self.num_ranks, -1).tolist(),
        )

    def run(self) -> int:
        """Everything, in every combination; returns how many combinations there were."""
        self.check_layout()
        modes = itertools.product((False, True), (False, True), (False, True), range(3))
        num_combinations = 0
        for previous_mode, async_mode, with_topk, kind in modes:
            x = (self.random, self.constant, per_token_cast_to_fp8(self.random))[kind]
            events = {"async_finish": async_mode}
            if previous_mode:
                events["previous_event"] = self.buffer.capture()
            self.check_round(x, with_topk=with_topk, events=events)
            num_combinations += 1
        self.time_a_round()
        self.buffer.destroy()
        return num_combinations

    def check_layout(self) -> None:
        batch = self.batch
        per_rank, per_domain, per_expert, is_token_in_rank, _ = self.buffer.get_dispatch_layout(
            batch.topk_idx, self.num_experts
        )
        assert per_domain is None
        assert torch.equal(per_rank, batch.num_tokens_per_rank)
        assert torch.equal(per_expert, batch.num_tokens_per_expert)
        assert torch.equal(is_token_in_rank, batch.is_token_in_rank)

    def check_round(self, x: Any, *, with_topk: bool, events: dict[str, Any]) -> None:
        batch = self.batch
        arguments = {
            "x": x,
            "num_tokens_per_rank": batch.num_tokens_per_rank,
            "is_token_in_rank": batch.is_token_in_rank,
            "num_tokens_per_expert": batch.num_tokens_per_expert,
            "config": self.config,
            **events,
        }
        if with_topk:
            weights = batch.random_weights if x is self.random else batch.topk_weights
            arguments.update(topk_idx=batch.topk_idx, topk_weights=weights)
        recv_x, recv_idx, recv_weights, counts, handle, event = self.buffer.dispatch(**arguments)
        self.wait(event, events)
        self.check_received(x, recv_x, counts, handle)
        if with_topk:
            self.check_choices(x, recv_idx, recv_weights, handle)
            self.check_worst_case(arguments, recv_x, recv_idx, recv_weights)
        self.check_cached(x, recv_x, handle, events)
        self.check_combine(x, recv_x, recv_weights if with_topk else None, handle, events)

    def wait(self, event: deep_ep.EventOverlap, events: dict[str, Any]) -> None:
        assert (event.event is not None) == events["async_finish"]
        if events["async_finish"]:
            event.current_stream_wait()

    def check_received(self, x: Any, recv_x: Any, counts: list[int], handle: Any) -> None:
        rows = per_token_cast_back(*recv_x) if isinstance(recv_x, tuple) else recv_x
        assert rows.size(0) == self.batch.received_per_rank[self.rank]
        assert counts == self.batch.received_per_expert[self.rank]
        if x is self.constant:
            self.check_sources(rows, handle[0])

    def check_sources(self, rows: torch.Tensor, rank_prefix_matrix: torch.Tensor) -> None:
        """Every row must hold the number of the rank it came from."""
        assert torch.equal(rows.amin(dim=1), rows.amax(dim=1))
        start = 0
        for source in range(self.num_ranks):
            end = int(rank_prefix_matrix[source][self.rank])
            assert bool((rows[start:end] == source).all())
            start = end
        assert start == rows.size(0)

    def check_choices(self, x: Any, idx: torch.Tensor, weights: torch.Tensor, handle: Any) -> None:
        assert bool(((idx == -1) | ((idx >= 0) & (idx < NUM_EXPERTS_PER_RANK))).all())
        counts = [int((idx == expert).sum()) for expert in range(NUM_EXPERTS_PER_RANK)]
        assert counts == self.batch.received_per_expert[self.rank]
        assert bool((weights[idx == -1] == 0).all())
        if x is not self.random:
            largest = weights.amax(dim=1, keepdim=True).expand_as(weights)
            self.check_sources(torch.where(idx == -1, largest, weights), handle[0])

    def check_worst_case(
        self, arguments: dict[str, Any], recv_x: Any, idx: torch.Tensor, weights: torch.Tensor
    ) -> None:
        num_worst_tokens = self.batch.num_tokens * self.num_ranks
        worst_x, worst_idx, worst_weights, empty, _, event = self.buffer.dispatch(
            **arguments, num_worst_tokens=num_worst_tokens
        )
        self.wait(event, arguments)
        assert empty == []
        num_received = idx.size(0)
        for worst, exact in zip(_parts(worst_x), _parts(recv_x), strict=True):
            assert worst.size(0) == num_worst_tokens
            assert torch.equal(_bytes(worst[:num_received]), _bytes(exact))
        assert torch.equal(worst_idx[:num_received], idx)
        assert torch.equal(worst_weights[:num_received], weights)
        assert bool((worst_idx[num_received:] == -1).all())

    def check_cached(self, x: Any, recv_x: Any, handle: Any, events: dict[str, Any]) -> None:
        again, *nothing, event = self.buffer.dispatch(
            x=x, handle=handle, config=self.config, **events
        )
        self.wait(event, events)
        assert nothing == [None, None, None, None]
        for cached, first in zip(_parts(again), _parts(recv_x), strict=True):
            assert torch.equal(_bytes(cached), _bytes(first))

    def check_combine(
        self, x: Any, recv_x: Any, weights: Any, handle: Any, events: dict[str, Any]
    ) -> None:
        rows = per_token_cast_back(*recv_x) if isinstance(recv_x, tuple) else recv_x
        combined, combined_weights, event = self.buffer.combine(
            x=rows, handle=handle, topk_weights=weights, config=self.config, **events
        )
        self.wait(event, events)
        sent = per_token_cast_back(*x) if isinstance(x, tuple) else x
        num_visited = self.batch.is_token_in_rank.sum(dim=1, keepdim=True)
        assert combined.dtype == torch.bfloat16
        assert calc_diff(combined.float() / num_visited, sent) < 5e-6
        if weights is None:
            assert combined_weights is None
            return
        batch = self.batch
        expected = batch.random_weights if x is self.random else batch.topk_weights
        assert calc_diff(combined_weights, expected) < 1e-9

    def time_a_round(self) -> None:
        _, _, _, _, handle, _ = self.buffer.dispatch(
            self.random,
            num_tokens_per_rank=self.batch.num_tokens_per_rank,
            is_token_in_rank=self.batch.is_token_in_rank,
            num_tokens_per_expert=self.batch.num_tokens_per_expert,
        )
        mean, smallest, largest = bench(
            lambda: self.buffer.dispatch(self.random, handle=handle), num_warmups=1, num_tests=3
        )
        assert 0 < smallest <= mean <= largest


def _parts(x: Any) -> tuple[torch.Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def run(group: dist.ProcessGroup, num_tokens: int, hidden: int) -> int:
    """One rank, in a world that somebody else has made."""
    return Program(group, num_tokens, hidden).run()


def start(local_rank: int, num_processes: int, num_tokens: int, hidden: int) -> None:
    """One process of a world that DeepEP's helper makes."""
    torch.set_num_threads(1)
    rank, num_ranks, group = init_dist(local_rank, num_processes)
    assert torch.get_default_dtype() is torch.bfloat16
    assert (rank, num_ranks) == (group.rank(), num_processes)
    tell(group, run(group, num_tokens, hidden))
    dist.destroy_process_group()


def join(num_tokens: int, hidden: int) -> None:
    """One process of a world that torchrun makes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tell(dist.group.WORLD, run(dist.group.WORLD, num_tokens, hidden))
    dist.destroy_process_group()


def tell(group: dist.ProcessGroup, num_combinations: int) -> None:
    dist.barrier(group=group)
    if group.rank() == 0:
        sys.stdout.write(f"{num_combinations} combinations passed on {group.size()} ranks\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-processes", type=int, default=4)
    parser.add_argument("--num-tokens", type=int, default=48)
    parser.add_argument("--hidden", type=int, default=256)
    given = parser.parse_args()
    if "LOCAL_RANK" in os.environ:
        join(given.num_tokens, given.hidden)
    else:
        arguments = (given.num_processes, given.num_tokens, given.hidden)
        torch.multiprocessing.spawn(start, args=arguments, nprocs=given.num_processes)


if __name__ == "__main__":
    main()
