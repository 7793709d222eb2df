"""Low-latency rows that stay where they land, in the benchmark on GPUs.

As FlashInfer's exchange has it: what goes back lies where the other ranks read it, added up over
the experts of a rank, not weighted. Every result is held against `bench_device_truth.py`.

Letters: T tokens of a rank, M slots for them, R ranks, H hidden.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from crossdock import Buffer
from crossdock.cli.bench_device_cases import PAIR, Figure, row_bytes
from crossdock.cli.bench_device_stage import Stage
from crossdock.cli.bench_device_truth import bits, decoded_rows, encoded, factor
from crossdock.reference import calc_diff
from crossdock.verbs import LowLatencyViews

__all__ = ["VIEWS", "measure_views"]

VIEWS = "crossdock, views"

_BOUND = 1e-5  # that of the case which the oracle judges


def measure_views(stage: Stage, buffer: Buffer, *, form: str) -> None:
    """Times dispatch and combine of views, in a format of the chapter. Collective."""
    calls, clock = _Calls(stage, buffer, form), stage.clock
    wall, graph, there = (
        calls.blank(*name) for name in ((PAIR, "wall"), (PAIR, "graph"), ("dispatch", "graph"))
    )
    stage.measure(wall, lambda: clock.wall(calls.pair, calls.sum_problem))
    stage.measure(graph, lambda: clock.graph(calls.pair, calls.sum_problem))
    stage.measure(there, lambda: clock.graph(calls.dispatch, calls.dispatch_problem))


class _Calls:
    """The calls on one rank, in one format."""

    def __init__(self, stage: Stage, buffer: Buffer, form: str) -> None:
        self.stage, self.buffer, self.form = stage, buffer, form
        self.truth, self.hidden = stage.truth, stage.setup.hidden
        self.x, self.topk_idx, self.topk_weights = stage.truth.mine
        self.rows: Tensor | None = None
        self.rows = stage.clock.agreed(self.leave)

    def leave(self) -> Tensor:
        """Leave what experts make of the rows in both places where a combine may read it."""
        rows = torch.empty(0)
        for _ in range(2):
            views = self.dispatch()
            planes = list(views.tokens) if isinstance(views.tokens, tuple) else [views.tokens]
            rows = decoded_rows(planes, self.form)
            rows *= factor(self.stage.rank, self.stage.setup.num_ranks)
            rows[views.src_idx < 0] = torch.nan
            self.buffer.get_next_low_latency_views_buffer(views, self.hidden).copy_(rows)
            self.combine(views)
        return rows

    def dispatch(self) -> LowLatencyViews:
        """Rows, and what their tokens chose."""
        views, _, _ = self.buffer.low_latency_dispatch_views(
            self.x,
            self.topk_idx,
            self.stage.chapter.num_slots,
            num_experts=self.stage.setup.num_experts,
            topk_weights=self.topk_weights,
            use_fp8=self.form == "fp8",
        )
        return views

    def combine(self, views: LowLatencyViews) -> Tensor:
        """The sums of what was left: `[T, H]`."""
        rows = self.buffer.get_next_low_latency_views_buffer(views, self.hidden)
        if self.rows is not None and not rows.is_cuda:  # there every dispatch has its own place
            rows.copy_(self.rows)
        combined, _, _ = self.buffer.low_latency_combine_views(
            rows, self.topk_idx, views, zero_copy=True
        )
        return combined

    def pair(self) -> Tensor:
        """Both, with rows that experts have left before."""
        return self.combine(self.dispatch())

    def dispatch_problem(self, views: LowLatencyViews) -> str:
        """What is wrong with what came."""
        planes = views.tokens if isinstance(views.tokens, tuple) else (views.tokens,)
        for source, inputs in enumerate(self.truth.drawn):
            here = self.truth.presence[source][:, self.stage.rank]
            if not torch.equal(views.src_idx[source, : len(here)] >= 0, here):
                return f"which rows of rank {source} there are"
            came = [bits(plane[source, : len(here)][here]) for plane in planes]
            sent = [plane[here] for plane in encoded(inputs.x, self.form)]
            if not all(map(torch.equal, came, sent)):
                return f"rows of rank {source}"
        return ""

    def sum_problem(self, got: Tensor) -> str:
        """What is wrong with the sums."""
        difference = calc_diff(got, self.truth.summed(self.form))
        return "" if difference < _BOUND else f"sums differ by {difference:.1e}"

    def blank(self, call: str, clock: str) -> Figure:
        """A figure without a time."""
        there, back = row_bytes(self.form, self.hidden), row_bytes("bf16", self.hidden)
        width = there if call == "dispatch" else there + back
        return replace(self.stage.blank(call, self.form, clock, width=width), system=VIEWS)
