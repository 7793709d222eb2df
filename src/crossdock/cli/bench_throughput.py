"""The high-throughput calls as a case of the benchmark, with those who contend in it.

How contenders take turns is the matter of `bench_world.py`, how the baselines work that of
`bench_baseline.py`.

Letters: R ranks, E experts, T tokens of a rank, K choices a token, H hidden, N rows received.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock import Buffer, ConfigError, reference
from crossdock.cli.bench_baseline import GlooBaseline, Received, TunedGlooBaseline
from crossdock.cli.bench_world import Case, Contender, Contenders, Expected, Inputs

__all__ = ["CONTENDERS", "DTYPES", "Throughput"]

DTYPES = MappingProxyType({"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32})


@dataclass(frozen=True, kw_only=True)
class Throughput(Case):
    """`dispatch` and `combine`, with the layout and without weights.

    Raises:
        ConfigError: the numbers do not go together, or there is no such dtype.
    """

    hidden: int = 4096
    num_experts: int = 64
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}, must be one of {', '.join(DTYPES)}")

    @property
    def contenders(self) -> Contenders:
        """See `Case`."""
        return CONTENDERS

    @property
    def combine_bound(self) -> float:
        """See `Case`; one rounding to bf16 makes 1.4e-6."""
        return 5e-6

    @property
    def round_trip_bytes(self) -> int:
        """See `Case`."""
        return 2 * self.hidden * DTYPES[self.dtype].itemsize

    def make_inputs(self, rank: int) -> Inputs:
        """See `Case`."""
        return self.drawn(rank, DTYPES[self.dtype])

    def moved(self, received: Received) -> dict[str, Tensor]:
        """See `Case`."""
        counts = received.num_tokens_per_expert
        return {
            "rows": received.x,
            "choices": received.topk_idx,
            "weights": received.topk_weights,
            "counts": torch.tensor(counts, dtype=torch.int64, device="cpu"),
        }

    def apply_experts(self, received: Received, rank: int) -> Tensor:
        """See `Case`; scaled differently on every rank."""
        return received.x * ((rank + 1) / self.num_ranks)

    def ask_oracle(self) -> list[Expected]:
        """See `Case`."""
        ranks = range(self.num_ranks)
        xs, idxs, weights = zip(*(self.make_inputs(rank) for rank in ranks), strict=True)
        moved = reference.dispatch(xs, idxs, weights, num_experts=self.num_experts)
        received = [_as_received(each) for each in moved]
        rows = [self.apply_experts(received[rank], rank) for rank in ranks]
        returned = reference.combine(rows, idxs, self.num_experts)
        ends = moved[0].rank_prefix_matrix
        num_rows = ends.diff(dim=0, prepend=ends.new_zeros(1, self.num_ranks))
        return [
            Expected(
                self.moved(received[rank]), returned[rank].combined, num_rows[:, rank].tolist()
            )
            for rank in ranks
        ]


def _as_received(moved: reference.ReferenceDispatch) -> Received:
    """The oracle's answer in the words of a contender; it has no scales here, and has choices."""
    return Received(
        cast("Tensor", moved.recv_x),
        cast("Tensor", moved.recv_topk_idx),
        cast("Tensor", moved.recv_topk_weights),
        moved.num_recv_tokens_per_expert,
        None,
    )


class CrossdockContender(Contender):
    """`Buffer` as a caller of DeepEP's interface uses it, without events."""

    def __init__(self, group: dist.ProcessGroup, case: Throughput) -> None:
        self.buffer = Buffer(group, transport=case.transport)
        self.num_experts = case.num_experts

    def __repr__(self) -> str:
        return repr(self.buffer)

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Received:
        """Layout and dispatch."""
        per_rank, per_domain, per_expert, is_token_in_rank, _ = self.buffer.get_dispatch_layout(
            topk_idx, self.num_experts
        )
        recv_x, recv_topk_idx, recv_topk_weights, counts, handle, _ = self.buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_domain,
            is_token_in_rank=is_token_in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
        )
        received = (recv_x, recv_topk_idx, recv_topk_weights, counts, handle)
        return Received(*cast("tuple[Any, ...]", received))

    def combine(self, x: Tensor, route: Any) -> Tensor:
        """Combine, without weights."""
        return self.buffer.combine(x, route)[0]


def _baseline(group: dist.ProcessGroup, case: Throughput) -> GlooBaseline:
    return GlooBaseline(group, case.num_experts)


def _tuned(group: dist.ProcessGroup, case: Throughput) -> GlooBaseline:
    return TunedGlooBaseline(group, case.num_experts)


CONTENDERS: Contenders = MappingProxyType(
    {"crossdock": CrossdockContender, "gloo": _baseline, "gloo tuned": _tuned}
)
