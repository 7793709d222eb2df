"""A program in the shape of DeepEP's own low-latency test: it checks itself as it goes.

Rows of a number for each rank tell their source, and end in the number of their token; experts give
back what they get, so each token must return times its weights. With `shrink` two ranks stop
calling, and the others have to notice and go on. Nothing here knows crossdock.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import deep_ep
from deep_ep.utils.envs import init_dist
from deep_ep.utils.math import calc_diff, hash_tensor, per_token_cast_back
from deep_ep.utils.testing import bench

NUM_EXPERTS_PER_RANK = 4
NUM_TOPK = 3
LAST_COLUMNS = 128
COUNT_BITS = 2**32 - 1

FORMATS: tuple[dict[str, bool], ...] = (
    {"use_fp8": False},
    {"use_fp8": True},
    {"use_fp8": True, "round_scale": True},
    {"use_fp8": True, "round_scale": True, "use_ue8m0": True},
)
WAYS_BACK: tuple[dict[str, bool], ...] = (
    {"use_logfmt": False, "zero_copy": False},
    {"use_logfmt": False, "zero_copy": True},
    {"use_logfmt": True, "zero_copy": False},
)
STOPS_AT = {"dispatch": 1, "combine": 3}
"""With `shrink`: which rank makes a call no more, from the first time on that it is made."""


class Report(NamedTuple):
    """What a rank has done: rounds passed, a sum of all bytes received, ranks found to be gone."""

    num_rounds: int
    hash_value: int
    masked: list[int]


class Received(NamedTuple):
    """What a dispatch brought, rows in bf16."""

    rows: torch.Tensor
    counts: torch.Tensor
    handle: Any


class Program:
    """The test of one rank."""

    def __init__(
        self, group: dist.ProcessGroup, num_tokens: int, hidden: int, *, shrink: bool = False
    ) -> None:
        self.group, self.rank, self.num_ranks = group, group.rank(), group.size()
        self.num_tokens, self.hidden, self.shrink = num_tokens, hidden, shrink
        self.num_experts = NUM_EXPERTS_PER_RANK * self.num_ranks
        num_rdma_bytes = deep_ep.Buffer.get_low_latency_rdma_size_hint(
            num_tokens, hidden, self.num_ranks, self.num_experts
        )
        self.buffer = deep_ep.Buffer(
            group,
            num_rdma_bytes=num_rdma_bytes,
            low_latency_mode=True,
            num_qps_per_rank=NUM_EXPERTS_PER_RANK,
            allow_nvlink_for_low_latency_mode=True,
            explicitly_destroy=True,
            allow_mnnvl=False,
            enable_shrink=shrink,
        )
        self.generator = torch.Generator().manual_seed(self.rank)
        self.make_tokens()
        self.make_choices()
        self.stopped: set[int] = set()
        self.mask_status = torch.zeros((self.num_ranks,), dtype=torch.int)
        self.hash_value = 0

    def make_tokens(self) -> None:
        size = (self.num_tokens, self.hidden)
        self.marked = torch.ones(size, dtype=torch.bfloat16) * mark_of(self.rank)
        numbers = torch.arange(self.num_tokens, dtype=torch.bfloat16)
        self.marked[:, -LAST_COLUMNS:] = numbers.view(-1, 1)
        noise = torch.randn(size, dtype=torch.float32, generator=self.generator)
        self.noise = (noise * 0.1).bfloat16()
        spread = torch.rand(size, dtype=torch.float32, generator=self.generator)
        self.spread = (noise * torch.exp2(spread * -12)).bfloat16()

    def make_choices(self) -> None:
        size = (self.num_tokens, self.num_experts)
        scores = torch.randn(size, dtype=torch.float32, generator=self.generator).abs() + 1
        topk_idx = torch.topk(scores, NUM_TOPK, dim=-1, largest=True, sorted=True).indices
        self.topk_idx = topk_idx.to(deep_ep.topk_idx_t)
        dropped = torch.rand(topk_idx.shape, dtype=torch.float32, generator=self.generator) < 0.1
        self.topk_idx[dropped] = -1
        weights = torch.randn(topk_idx.shape, dtype=torch.float32, generator=self.generator)
        self.topk_weights = weights.abs()
        gathered = [torch.empty_like(self.topk_idx) for _ in range(self.num_ranks)]
        dist.all_gather(gathered, self.topk_idx, group=self.group)
        self.all_topk_idx = torch.stack(gathered)

    def run(self) -> Report:
        """Everything, in every combination, until this rank stops."""
        tokens = (self.marked,) if self.shrink else (self.marked, self.noise, self.spread)
        num_rounds = 0
        for x, use_hook, form in itertools.product(tokens, (False, True), FORMATS):
            if not self.check_round(x, form, use_hook=use_hook, num_repeats=num_rounds % 2 + 1):
                break
            num_rounds += 1
        if not self.shrink:
            self.time_a_round()
        self.buffer.destroy()
        return Report(num_rounds, self.hash_value, self.mask_status.nonzero().flatten().tolist())

    def has_stopped(self, call: str) -> bool:
        if self.shrink:
            self.stopped.add(STOPS_AT[call])
        return self.rank in self.stopped

    def check_round(
        self, x: torch.Tensor, form: dict[str, bool], *, use_hook: bool, num_repeats: int
    ) -> bool:
        """One dispatch, repeated, and every way back; whether this rank still takes part."""
        if self.has_stopped("dispatch"):
            return False
        received = self.check_dispatch(x, form, use_hook=use_hook, num_repeats=num_repeats)
        for way in WAYS_BACK:
            if self.has_stopped("combine"):
                return False
            self.check_combine(x, received, form, way, use_hook=use_hook)
        return True

    def check_dispatch(
        self, x: torch.Tensor, form: dict[str, bool], *, use_hook: bool, num_repeats: int
    ) -> Received:
        stats = torch.zeros((NUM_EXPERTS_PER_RANK,), dtype=torch.int)
        for _ in range(num_repeats):
            packed, counts, handle, event, hook = self.buffer.low_latency_dispatch(
                x,
                self.topk_idx,
                self.num_tokens,
                self.num_experts,
                cumulative_local_expert_recv_stats=stats,
                async_finish=not use_hook,
                return_recv_hook=use_hook,
                **form,
            )
            self.receive(event, hook, use_hook=use_hook)
        self.check_masks()
        assert torch.equal(stats, counts * num_repeats)
        self.check_scales(packed, counts, form)
        self.hash_received(packed, counts)
        received = Received(self.to_bf16(packed), counts, handle)
        for expert in range(NUM_EXPERTS_PER_RANK):
            self.check_expert(received, expert)
            if x is self.marked:
                self.check_rows(received, expert, is_exact=not form.get("round_scale", False))
        return received

    def receive(self, event: deep_ep.EventOverlap, hook: Any, *, use_hook: bool) -> None:
        """Run the hook after other work, or wait for the event: one of the two is there."""
        assert (hook is not None) == use_hook
        assert (event.event is None) == use_hook
        if use_hook:
            large = torch.ones((64, 64), dtype=torch.float32)
            assert float((large @ large).sum()) == 64**3
            hook()
        else:
            event.current_stream_wait()

    def to_bf16(self, packed: Any) -> torch.Tensor:
        """All slabs decoded, also where nothing was received."""
        if isinstance(packed, torch.Tensor):
            return packed.clone()
        data, scales = packed[0], packed[1].contiguous()
        blocks = scales.view(-1, self.hidden // 128)
        return per_token_cast_back(data.view(-1, self.hidden), blocks).view(data.shape)

    def check_scales(self, packed: Any, counts: torch.Tensor, form: dict[str, bool]) -> None:
        """Column-major, a number or an exponent for 128 columns, and powers of two if rounded."""
        assert isinstance(packed, tuple) == form["use_fp8"]
        if not form["use_fp8"]:
            return
        is_packed = form.get("use_ue8m0", False)
        num_rows = self.num_ranks * self.num_tokens
        width = self.hidden // (512 if is_packed else 128)
        assert packed[0].dtype == torch.float8_e4m3fn
        assert packed[1].dtype == (torch.int if is_packed else torch.float)
        assert tuple(packed[1].shape) == (NUM_EXPERTS_PER_RANK, num_rows, width)
        assert packed[1].stride() == (num_rows * width, 1, num_rows)
        if form.get("round_scale", False) and not is_packed:
            for scales, count in zip(packed[1], counts.tolist(), strict=True):
                assert bool((torch.frexp(scales[:count]).mantissa == 0.5).all())

    def hash_received(self, packed: Any, counts: torch.Tensor) -> None:
        for expert, count in enumerate(counts.tolist()):
            for part in packed if isinstance(packed, tuple) else (packed,):
                self.add_to_hash(part[expert, :count])

    def add_to_hash(self, part: torch.Tensor) -> None:
        """In order, since equal parts come again and again."""
        self.hash_value = (self.hash_value * 31 + hash_tensor(part)) % 2**61

    def check_masks(self) -> None:
        if self.shrink:
            self.buffer.low_latency_query_mask_buffer(self.mask_status)
            assert set(self.mask_status.nonzero().squeeze(-1).tolist()) == self.stopped

    def check_expert(self, received: Received, expert: int) -> None:
        """The three places where the number of rows can be read agree with what was sent."""
        sent = self.all_topk_idx == self.rank * NUM_EXPERTS_PER_RANK + expert
        num_sent = sent.sum(dim=(1, 2)) * (self.mask_status == 0)
        counts = received.handle[1][expert] & COUNT_BITS
        assert counts.tolist() == num_sent.tolist()
        assert int(received.counts[expert]) == int(num_sent.sum())

    def check_rows(self, received: Received, expert: int, *, is_exact: bool) -> None:
        """Every row holds the mark of the rank it came from, and the number of its token."""
        num_rows = int(received.counts[expert])
        rows = received.rows[expert, :num_rows].float()
        tokens = received.handle[0][expert, :num_rows].view(-1, 1).float()
        allowed = torch.zeros_like(tokens) if is_exact else tokens / 16  # half a unit of e4m3
        assert bool(((rows[:, -LAST_COLUMNS:] - tokens).abs() <= allowed).all())
        for source in range(self.num_ranks):
            if self.mask_status[source]:
                continue
            packed = int(received.handle[1][expert][source])
            begin, count = packed >> 32, packed & COUNT_BITS
            assert bool((rows[begin : begin + count, :-LAST_COLUMNS] == mark_of(source)).all())

    def check_combine(
        self,
        x: torch.Tensor,
        received: Received,
        form: dict[str, bool],
        way: dict[str, bool],
        *,
        use_hook: bool,
    ) -> None:
        outputs = received.rows.clone()
        for expert, count in enumerate(received.counts.tolist()):
            outputs[expert, count:] = float("nan")
        if way["zero_copy"]:
            self.buffer.get_next_low_latency_combine_buffer(received.handle)[:, :, :] = outputs
            outputs.fill_(float("nan"))  # only the buffer is read
        out = torch.empty((self.num_tokens, self.hidden), dtype=torch.bfloat16)
        combined, event, hook = self.buffer.low_latency_combine(
            outputs,
            self.topk_idx,
            self.topk_weights,
            received.handle,
            async_finish=not use_hook,
            return_recv_hook=use_hook,
            out=out,
            **way,
        )
        self.receive(event, hook, use_hook=use_hook)
        self.check_masks()
        assert combined.data_ptr() == out.data_ptr()
        assert not bool(torch.isnan(combined).any())
        bound = 1e-3 if way["use_logfmt"] else 9e-4 if form["use_fp8"] else 1e-5
        assert calc_diff(x.float() * self.expected_weights(), combined) < bound
        self.add_to_hash(combined)

    def expected_weights(self) -> torch.Tensor:
        """What is left of each token's weights: `[T, 1]`."""
        owners = (self.topk_idx.clamp(min=0) // NUM_EXPERTS_PER_RANK).to(torch.int64)
        is_gone = (self.topk_idx == -1) | (self.mask_status[owners] != 0)
        return self.topk_weights.masked_fill(is_gone, 0).sum(dim=1).view(-1, 1)

    def call_both(self, use_hook: bool) -> None:
        packed, _, handle, _, hook = self.buffer.low_latency_dispatch(
            self.noise,
            self.topk_idx,
            self.num_tokens,
            self.num_experts,
            use_fp8=False,
            async_finish=False,
            return_recv_hook=use_hook,
        )
        if hook is not None:
            hook()
        _, _, hook = self.buffer.low_latency_combine(
            packed, self.topk_idx, self.topk_weights, handle, return_recv_hook=use_hook
        )
        if hook is not None:
            hook()

    def time_a_round(self) -> None:
        for use_hook in (False, True):
            call = partial(self.call_both, use_hook)
            mean, smallest, largest = bench(call, num_warmups=1, num_tests=3)
            assert 0 < smallest <= mean <= largest


def mark_of(rank: int) -> float:
    """A number for each of up to eight ranks that every format holds exactly."""
    return float(-8 - rank)


def run(group: dist.ProcessGroup, num_tokens: int, hidden: int, *, shrink: bool = False) -> Report:
    """One rank, in a world that somebody else has made."""
    return Program(group, num_tokens, hidden, shrink=shrink).run()


def start(local_rank: int, num_processes: int, num_tokens: int, hidden: int) -> None:
    """One process of a world that DeepEP's helper makes; twice, for the same bytes."""
    torch.set_num_threads(1)
    rank, num_ranks, group = init_dist(local_rank, num_processes)
    first, second = (run(group, num_tokens, hidden) for _ in range(2))
    assert first == second
    dist.barrier(group=group)
    if rank == 0:
        sys.stdout.write(f"{first.num_rounds} rounds passed on {num_ranks} ranks\n")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-processes", type=int, default=4)
    parser.add_argument("--num-tokens", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=512)
    given = parser.parse_args()
    arguments = (given.num_processes, given.num_tokens, given.hidden)
    torch.multiprocessing.spawn(start, args=arguments, nprocs=given.num_processes)


if __name__ == "__main__":
    main()
