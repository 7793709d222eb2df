"""An inference engine's use of DeepEP: prepare, experts, finalize, with weights on this side.

Tokens may be quantised before they travel; experts work on global ids, so what a rank does not own
is pointed at somebody else's expert; finalize brings unweighted sums. Nothing here knows crossdock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import deep_ep
from deep_ep.utils.math import per_token_cast_back, per_token_cast_to_fp8


class Prepared(NamedTuple):
    """What the experts of a rank work on."""

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    num_tokens_per_expert: list[int]


class PrepareFinalize:
    """Both halves of a layer, over one buffer that the engine made."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int, *, use_fp8: bool) -> None:
        self.buffer = deep_ep.Buffer(
            group=group,
            num_nvl_bytes=1 << 20,
            num_rdma_bytes=0,
            low_latency_mode=False,
            num_qps_per_rank=1,
            explicitly_destroy=True,
        )
        self.num_experts, self.use_fp8 = num_experts, use_fp8
        self.num_local = num_experts // group.size()
        self.rank, self.num_ranks = group.rank(), group.size()
        self.handle: Any = None

    def prepare_async(
        self, x: torch.Tensor, topk_weights: torch.Tensor, topk_idx: torch.Tensor
    ) -> Callable[[], Prepared]:
        """Sends; what it returns receives."""
        tokens = per_token_cast_to_fp8(x) if self.use_fp8 else x
        previous_event = self.buffer.capture()
        per_rank, per_domain, per_expert, is_token_in_rank, event = self.buffer.get_dispatch_layout(
            topk_idx=topk_idx,
            num_experts=self.num_experts,
            previous_event=previous_event,
            async_finish=False,
            allocate_on_comm_stream=False,
        )
        assert event.event is None
        received, recv_idx, recv_weights, counts, self.handle, event = self.buffer.dispatch(
            x=tokens,
            handle=None,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_domain,
            is_token_in_rank=is_token_in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            expert_alignment=1,
            config=self.get_config("dispatch"),
            previous_event=previous_event,
            async_finish=True,
            allocate_on_comm_stream=False,
        )
        return lambda: self.receive(event, received, recv_idx, recv_weights, counts)

    def receive(
        self, event: Any, received: Any, idx: torch.Tensor, weights: Any, counts: list[int]
    ) -> Prepared:
        if event.event is not None:
            event.current_stream_wait()
        rows, scales = received if self.use_fp8 else (received, None)
        first = self.rank * self.num_local
        elsewhere = self.num_experts - 1 if first == 0 else 0
        global_idx = torch.where(idx == -1, elsewhere, idx + first)
        return Prepared(rows, scales, global_idx, weights, counts)

    def finalize(self, rows: torch.Tensor, output: torch.Tensor) -> None:
        """Brings the rows back, each already weighted and reduced on this rank."""
        combined, _, event = self.buffer.combine(
            x=rows,
            handle=self.handle,
            topk_weights=None,
            config=self.get_config("combine"),
            previous_event=None,
            async_finish=False,
            allocate_on_comm_stream=False,
        )
        if event.event is not None:
            event.current_stream_wait()
        output.copy_(combined, non_blocking=True)

    def get_config(self, verb: str) -> deep_ep.Config:
        return getattr(deep_ep.Buffer, f"get_{verb}_config")(self.num_ranks)


def apply_experts(prepared: Prepared, factors: torch.Tensor, experts: range) -> torch.Tensor:
    """`factors[e] * x`, weighted and summed over the experts of this rank: `[N, H]` bf16."""
    rows = prepared.x
    if prepared.scales is not None:
        rows = per_token_cast_back(rows, prepared.scales)
    is_mine = (prepared.topk_idx >= experts.start) & (prepared.topk_idx < experts.stop)
    weights = (factors[prepared.topk_idx] * prepared.topk_weights * is_mine).sum(dim=1)
    return (rows.float() * weights[:, None]).to(torch.bfloat16)


def layer(
    group: dist.ProcessGroup,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    factors: torch.Tensor,
    use_fp8: bool,
) -> tuple[Prepared, torch.Tensor]:
    """One MoE layer whose expert `e` multiplies by `factors[e]`; also what this rank received."""
    engine = PrepareFinalize(group, len(factors), use_fp8=use_fp8)
    prepared = engine.prepare_async(x, topk_weights, topk_idx)()
    first = engine.rank * engine.num_local
    rows = apply_experts(prepared, factors, range(first, first + engine.num_local))
    output = torch.empty_like(x)
    engine.finalize(rows, output)
    engine.buffer.destroy()
    return prepared, output
