"""The library's high-throughput calls in the benchmark on GPUs.

Layout, dispatch of bf16 and of fp8 with scales, cached, with a fixed number of rows, and combine,
for every SM count. Every result is held against `bench_device_truth.py`.

N rows received.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from crossdock import Buffer, Config
from crossdock.cli.bench_device_clocks import Call, Check
from crossdock.cli.bench_device_stage import Stage
from crossdock.cli.bench_device_truth import bits, encode, encoded, factor
from crossdock.reference import calc_diff

__all__ = ["ThroughputCalls", "measure_throughput", "sum_problem"]

_SUM_BOUND = 5e-6  # that of the case which the oracle judges


def measure_throughput(stage: Stage) -> None:
    """Times the library's calls, for every SM count of the chapter. Collective."""
    usual = Buffer.num_sms
    try:
        with stage.buffer(max_tokens_per_rank=stage.chapter.num_tokens) as buffer:
            for num_sms in stage.chapter.sms:
                Buffer.set_num_sms(num_sms)
                ThroughputCalls(stage, buffer, num_sms=num_sms).measure()
            stage.describe(buffer)
    finally:
        Buffer.set_num_sms(usual)


class ThroughputCalls:
    """The library's calls on one rank, with one SM count.

    Attributes:
        config: what cached dispatches and combines are given.
    """

    def __init__(self, stage: Stage, buffer: Buffer, *, num_sms: int) -> None:
        self.stage, self.buffer, self.num_sms = stage, buffer, num_sms
        self.config: Config | None = None
        self.truth, self.num_ranks = stage.truth, stage.setup.num_ranks
        self.x, self.topk_idx, self.topk_weights = stage.truth.mine
        self.encoded = encode(self.x)
        self.known = self.layout()
        recv_x, _, _, _, self.handle, _ = stage.clock.agreed(self.dispatch)
        self.rows = recv_x * factor(stage.rank, self.num_ranks)

    def measure(self) -> None:
        """Times each call."""
        self.one("layout", self.layout, self.layout_problem, width=0)
        self.one("dispatch", self.dispatch, self.dispatch_problem)
        self.one("dispatch", self.dispatch_fp8, self.dispatch_problem, form="fp8")
        self.one("dispatch, cached", self.dispatch_again, lambda got: self.rows_problem(got[0]))
        self.one("dispatch, fixed rows", self.dispatch_fixed, self.fixed_problem)
        self.one("dispatch, views", self.dispatch_views, self.views_problem)
        views_fp8 = partial(self.dispatch_views, self.encoded)
        self.one("dispatch, views", views_fp8, self.views_problem, form="fp8")
        again_fp8 = partial(self.dispatch_again, self.encoded)
        self.one("dispatch, cached", again_fp8, lambda got: self.rows_problem(got[0]), form="fp8")
        self.one("combine", self.combine, lambda got: sum_problem(self.stage, got[0]))

    def one(
        self, name: str, call: Call, check: Check, *, form: str = "bf16", width: int | None = None
    ) -> None:
        """Times a call; see `Stage.blank` for what it moves."""
        blank = self.stage.blank(name, form, "events", num_sms=self.num_sms, width=width)
        figure = self.stage.measure(blank, lambda: self.stage.clock.events(call, check))
        self.stage.explain(figure, call)

    def layout(self) -> Any:
        """Where the tokens go."""
        return self.buffer.get_dispatch_layout(self.topk_idx, self.stage.setup.num_experts)

    def dispatch(self, x: Any = None, num_worst_tokens: int = 0) -> Any:
        """Dispatch with a known layout."""
        per_rank, per_domain, per_expert, is_token_in_rank, _ = self.known
        return self.buffer.dispatch(
            self.x if x is None else x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_domain,
            is_token_in_rank=is_token_in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=self.topk_idx,
            topk_weights=self.topk_weights,
            num_worst_tokens=num_worst_tokens,
        )

    def dispatch_fp8(self) -> Any:
        """The same for fp8 with scales."""
        return self.dispatch(self.encoded)

    def dispatch_again(self, x: Any = None) -> Any:
        """The way of an earlier dispatch."""
        given = self.x if x is None else x
        return self.buffer.dispatch(given, handle=self.handle, config=self.config)

    def dispatch_fixed(self) -> Any:
        """As many rows as could come: nobody has to wait for counts."""
        return self.dispatch(num_worst_tokens=self.num_ranks * len(self.x))

    def dispatch_views(self, x: Any = None) -> Any:
        """The rows where they land; nobody copies them."""
        _, _, per_expert, is_token_in_rank, _ = self.known
        views, _ = self.buffer.dispatch_views(
            self.x if x is None else x,
            len(self.x),
            is_token_in_rank=is_token_in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=self.topk_idx,
            topk_weights=self.topk_weights,
        )
        return views

    def combine(self) -> Any:
        """The rows back, summed."""
        return self.buffer.combine(self.rows, self.handle, config=self.config)

    def layout_problem(self, got: Any) -> str:
        """What is wrong with a layout."""
        right = torch.equal(got[3], self.truth.presence[self.stage.rank])
        return "" if right else "layout"

    def dispatch_problem(self, got: Any) -> str:
        """What is wrong with what dispatch returned."""
        recv_x, choices, weights, counts = got[:4]
        wrong = [self.rows_problem(recv_x)]
        wrong += [] if torch.equal(choices, self.truth.choices) else ["choices"]
        wrong += [] if torch.equal(weights, self.truth.weights) else ["weights"]
        wrong += [] if counts == self.truth.expert_counts else ["counts"]
        return ", ".join(filter(None, wrong))

    def fixed_problem(self, got: Any) -> str:
        """The same for a fixed number of rows: those that came, and what marks the others."""
        num_rows = len(self.truth.choices)
        came = [plane[:num_rows] for plane in got[:3]]
        is_marked = bool((got[1][num_rows:] == -1).all()) and got[3] == []
        problem = self.dispatch_problem((*came, self.truth.expert_counts))
        return problem or ("" if is_marked else "what marks missing rows")

    def views_problem(self, got: Any) -> str:
        """What is wrong with rows that lie where they landed."""
        planes = [got.tokens] if isinstance(got.tokens, Tensor) else list(got.tokens)
        counts = got.num_rows.tolist()
        came = [[each[rank, :num] for rank, num in enumerate(counts)] for each in planes]
        rows = [torch.cat(parts) for parts in came]
        return self.rows_problem(rows[0] if len(rows) == 1 else tuple(rows))

    def rows_problem(self, recv_x: Any) -> str:
        """What is wrong with received rows, of bf16 or of fp8 with scales."""
        planes, form = ([recv_x], "bf16") if isinstance(recv_x, Tensor) else (recv_x, "fp8")
        sent = [encoded(inputs.x, form) for inputs in self.truth.drawn]
        wanted = [self.truth.landed(parts) for parts in zip(*sent, strict=True)]
        return "" if all(map(torch.equal, map(bits, planes), wanted)) else "rows"


def sum_problem(stage: Stage, combined: Tensor) -> str:
    """What is wrong with what a high-throughput combine returned."""
    difference = calc_diff(combined, stage.truth.summed())
    return "" if difference < _SUM_BOUND else f"sums differ by {difference:.1e}"
