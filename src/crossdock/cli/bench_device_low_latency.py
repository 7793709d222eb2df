"""The library's low-latency calls in the benchmark on GPUs.

Dispatch and combine, together and each alone, in a CUDA graph and from the host, with hooks, and
with the weights given to dispatch already. Every result is held against `bench_device_truth.py`;
that of a graph is what its last call leaves behind.

Letters: L experts of a rank, T tokens of a rank, M slots for them, R ranks, H hidden, K choices a
token, P (token, expert) pairs that arrive.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from crossdock import Buffer
from crossdock.cli.bench_device_cases import HOOKED, KNOWN, PAIR, Figure, row_bytes
from crossdock.cli.bench_device_clocks import Call, Check
from crossdock.cli.bench_device_low_latency_views import measure_views
from crossdock.cli.bench_device_stage import Stage
from crossdock.cli.bench_device_truth import bits, decoded, encoded, factor
from crossdock.reference import calc_diff

__all__ = ["measure_low_latency"]

_BOUND = 1e-5  # that of the case which the oracle judges


def measure_low_latency(stage: Stage) -> None:
    """Times the calls, for every format of the chapter. Collective."""
    setup = stage.setup
    sizes = (stage.chapter.num_slots, setup.hidden, setup.num_ranks, setup.num_experts)
    hint = Buffer.get_low_latency_rdma_size_hint(*sizes)
    for form in stage.chapter.forms:
        with stage.buffer(num_rdma_bytes=hint, low_latency_mode=True) as buffer:
            calls = _Calls(stage, buffer, form=form)
            calls.measure()
            measure_views(stage, buffer, form=form)
            stage.describe(buffer, **{f"{form} slabs": calls.slab_bytes})


class _Calls:
    """The calls on one rank, in one format."""

    def __init__(self, stage: Stage, buffer: Buffer, *, form: str) -> None:
        self.stage, self.buffer, self.form = stage, buffer, form
        self.truth, self.setup = stage.truth, stage.setup
        self.x, self.topk_idx, self.topk_weights = stage.truth.mine
        self.slabs, _, self.handle = stage.clock.agreed(self.dispatch)
        self.outputs = self._expert_outputs()

    @property
    def slab_bytes(self) -> int:
        """Bytes of what a dispatch returns."""
        return sum(plane.nbytes for plane in _planes(self.slabs))

    def measure(self) -> None:
        """Times the calls from the host, then in graphs: as long as the first can be captured."""
        pair, known, hooked = (
            partial(self.pair, weights=weights, hooked=hooked)
            for weights, hooked in ((None, False), (self.topk_weights, False), (None, True))
        )
        dispatched, combined = self.dispatch_problem, self.combine_problem
        self.one(PAIR, pair, combined, clock="wall")
        self.one(HOOKED, hooked, combined, clock="wall")
        first = self.one(PAIR, pair, combined, clock="graph")
        for name, call, check in (
            (KNOWN, known, combined),
            (HOOKED, hooked, combined),
            ("dispatch", self.dispatch, dispatched),
            ("combine", self.combine, combined),
        ):
            self.one(name, call, check, clock="graph", why=first.why)

    def one(self, name: str, call: Call, check: Check, *, clock: str, why: str = "") -> Figure:
        """Times a call, unless it is known why that will not do."""
        blank = self._blank(name, clock)
        if why:
            figure = replace(blank, why=why)
            self.stage.report.figures.append(figure)
            return figure
        take = self.stage.clock.graph if clock == "graph" else self.stage.clock.wall
        figure = self.stage.measure(blank, lambda: take(call, check))
        if clock == "wall":
            self.stage.explain(figure, call)
        return figure

    def pair(self, *, weights: Tensor | None, hooked: bool) -> Tensor:
        """Dispatch, and combine of what the experts made of it before."""
        _, _, handle = self.dispatch(weights=weights, hooked=hooked)
        return self.combine(handle, hooked=hooked)

    def dispatch(self, *, weights: Tensor | None = None, hooked: bool = False) -> Any:
        """Slabs, their counts and the handle."""
        slabs, counts, handle, _, hook = self.buffer.low_latency_dispatch(
            self.x,
            self.topk_idx,
            self.stage.chapter.num_slots,
            self.setup.num_experts,
            use_fp8=self.form == "fp8",
            return_recv_hook=hooked,
            topk_weights=weights,
        )
        if hook is not None:
            hook()
        return slabs, counts, handle

    def combine(self, handle: Any = None, *, hooked: bool = False) -> Tensor:
        """The experts' rows, weighted and summed: `[T, H]`."""
        combined, _, hook = self.buffer.low_latency_combine(
            self.outputs,
            self.topk_idx,
            self.topk_weights,
            self.handle if handle is None else handle,
            return_recv_hook=hooked,
        )
        if hook is not None:
            hook()
        return combined

    def dispatch_problem(self, got: Any) -> str:
        """What is wrong with slabs and counts."""
        slabs, counts, _ = got
        expert, place, origin = self.truth.pairs
        wanted = torch.bincount(expert, minlength=self.setup.num_local)
        if not torch.equal(counts.long(), wanted):
            return "counts"
        sent = [encoded(inputs.x, self.form) for inputs in self.truth.drawn]
        wanted_planes = [torch.cat(parts)[origin] for parts in zip(*sent, strict=True)]
        got_planes = [bits(plane)[expert, place] for plane in _planes(slabs)]
        is_right = all(map(torch.equal, got_planes, wanted_planes))
        return "" if is_right else "rows or scales"

    def combine_problem(self, got: Tensor) -> str:
        """What is wrong with the sums."""
        difference = calc_diff(got, self.truth.weighted(self.form))
        return "" if difference < _BOUND else f"sums differ by {difference:.1e}"

    def _blank(self, name: str, clock: str) -> Figure:
        there, back = row_bytes(self.form, self.setup.hidden), row_bytes("bf16", self.setup.hidden)
        width = {"dispatch": there, "combine": back}.get(name, there + back)
        return self.stage.blank(name, self.form, clock, width=width)

    def _expert_outputs(self) -> Tensor:
        """`[L, R * M, H]` bf16: each row as its expert returns it, NaN where there is none."""
        expert, place, origin = self.truth.pairs
        rows = torch.cat([decoded(inputs.x, self.form) for inputs in self.truth.drawn])[origin]
        numbers = expert + self.stage.rank * self.setup.num_local
        each = factor(numbers.float(), self.setup.num_experts)
        size = (self.setup.num_local, self.setup.num_ranks * self.stage.chapter.num_slots)
        outputs = torch.full(
            (*size, self.setup.hidden), torch.nan, dtype=torch.bfloat16, device=rows.device
        )
        outputs[expert, place] = (rows * each.unsqueeze(1)).to(torch.bfloat16)
        return outputs


def _planes(tokens: Any) -> list[Tensor]:
    """Payload, and scales if there are."""
    return [tokens] if isinstance(tokens, Tensor) else list(tokens)
