"""FlashInfer's one-sided MoE all-to-all in the benchmark on GPUs, where it is installed.

A block a token stores the token's row into a slot of every rank that wants it. The caller gets
views of the memory that peers write, `[R, T, ...]`, of which the first rows of each source are
filled, in any order; combine reads rows that already lie in that memory, and sums them unweighted.
So less is done than by the library: nothing is packed, encoded, laid out by expert or weighted.
Expert ids and weights travel with the rows, as a layer needs them.

Written for flashinfer-python 0.6. It compiles its kernels when they are first used, which takes a
minute or two, unless that was done before.

R ranks, T tokens of a rank, K choices a token, H hidden.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from crossdock import UnsupportedError
from crossdock.cli.bench_device_cases import FORMS, HIGH_THROUGHPUT, PAIR, row_bytes
from crossdock.cli.bench_device_clocks import Call, Check
from crossdock.cli.bench_device_stage import Stage
from crossdock.cli.bench_device_truth import bits, decoded_rows, encode, encoded, factor
from crossdock.reference import calc_diff

__all__ = ["measure_flashinfer"]

_BOUND = 5e-6  # that of the library


def measure_flashinfer(stage: Stage) -> None:
    """Times dispatch and combine: with a cold cache, or in graphs for few tokens. Collective."""
    exchange = stage.clock.agreed(lambda: _Exchange(stage))
    is_throughput = stage.chapter.mode == HIGH_THROUGHPUT
    for form in FORMS if is_throughput else stage.chapter.forms:
        calls = _Calls(stage, exchange, form)
        if is_throughput:
            calls.measure_throughput()
        else:
            calls.measure_low_latency()
    stage.report.about[str(stage.chapter)] = f"flashinfer {exchange.version}, results in views"
    stage.report.memory[str(stage.chapter)] = {"peer-addressable": exchange.workspace_bytes}


class _Exchange:
    """The memory that peers write, and the two calls on it."""

    def __init__(self, stage: Stage) -> None:
        self.comm, mnnvl, self.version = _modules(stage)
        setup, num_ranks = stage.setup, stage.setup.num_ranks
        self.num_tokens, self.rank, self.num_ranks = stage.chapter.num_tokens, stage.rank, num_ranks
        mapping = self.comm.Mapping(
            world_size=num_ranks,
            rank=stage.rank,
            gpus_per_node=num_ranks,
            tp_size=num_ranks,
            moe_ep_size=num_ranks,
        )
        made = self.comm.MoeAlltoAll(
            mapping,
            self.num_tokens,
            setup.num_topk,
            setup.num_experts,
            hidden_size=setup.hidden,
            mnnvl_config=mnnvl.MnnvlConfig(comm_backend=mnnvl.TorchDistBackend(stage.meeting)),
        )
        self.workspace, self.metainfo = made.workspace, made.metainfo
        self.workspace_bytes = int(made.workspace_size_per_rank)
        self.sizes = (self.num_tokens, stage.rank, num_ranks, setup.num_topk)
        self.num_experts = setup.num_experts

    def dispatch(self, ids: Tensor, payloads: list[Tensor]) -> tuple[list[Tensor], int]:
        """Views `[R, T, ...]` of what came, and where combine wants its rows."""
        views, offset, *_ = self.comm.moe_a2a_dispatch(
            ids, payloads, self.workspace, self.metainfo, *self.sizes, self.num_experts
        )
        return views, offset

    def rows(self, offset: int, hidden: int) -> Tensor:
        """`[R, T, H]` bf16, where combine wants its rows."""
        nbytes = self.num_ranks * self.num_tokens * hidden * torch.bfloat16.itemsize
        view: Tensor = self.comm.moe_a2a_wrap_payload_tensor_in_workspace(
            self.workspace[self.rank],
            [self.num_ranks, self.num_tokens],
            offset,
            offset + nbytes,
            torch.bfloat16,
        )
        return view

    def combine(self, rows: Tensor, offset: int, *, out: Tensor) -> Tensor:
        """`[T, H]` bf16, the sums of rows that lie where `rows` says."""
        tokens_here = self.num_tokens
        combined: Tensor = self.comm.moe_a2a_combine(
            rows, tokens_here, self.workspace, self.metainfo, *self.sizes, offset,
            payload_in_workspace=True, output=out,
        )  # fmt: skip
        return combined


class _Calls:
    """Dispatch and combine of one form of tokens on one rank."""

    def __init__(self, stage: Stage, exchange: _Exchange, form: str) -> None:
        self.stage, self.exchange, self.form, self.truth = stage, exchange, form, stage.truth
        x, topk_idx, topk_weights = self.truth.mine
        self.ids = topk_idx.to(torch.int32)
        planes = [x] if form == "bf16" else [bits(plane) for plane in encode(x)]
        self.payloads = [*planes, self.ids, topk_weights]
        self.num_planes = len(planes)
        self.out = torch.empty_like(x)
        _, self.offset = stage.clock.agreed(self.dispatch)
        self.rows = exchange.rows(self.offset, stage.setup.hidden)

    def measure_throughput(self) -> None:
        """Single calls with a cold cache."""
        there, back = self._blank("dispatch", "events"), self._blank("combine", "events")
        calls: list[tuple[Call, Check]] = [
            (self.dispatch, self.dispatch_problem),
            (self.combine, self.sum_problem),
        ]
        figures = self.stage.measure_all([there, back], lambda: self.stage.clock.alternating(calls))
        self.stage.explain(figures[0], self.pair)

    def measure_low_latency(self) -> None:
        """Calls in graphs; combine cannot go alone, since it follows the flags of a dispatch."""
        clock = self.stage.clock
        self.stage.measure(
            self._blank(PAIR, "wall"), lambda: clock.wall(self.pair, self.pair_problem)
        )
        self.stage.measure(
            self._blank(PAIR, "graph"), lambda: clock.graph(self.pair, self.pair_problem)
        )
        self.stage.measure(
            self._blank("dispatch", "graph"), lambda: clock.graph(self.dispatch, lambda _: "")
        )

    def dispatch(self) -> tuple[list[Tensor], int]:
        """Tokens there."""
        return self.exchange.dispatch(self.ids, self.payloads)

    def combine(self) -> Tensor:
        """Rows back, and their sums."""
        return self.exchange.combine(self.rows, self.offset, out=self.out)

    def pair(self) -> Tensor:
        """Both, with rows that experts have left before."""
        self.dispatch()
        return self.combine()

    def pair_problem(self, _: Tensor) -> str:
        """What is wrong with both, made once more with experts in between."""
        return self.dispatch_problem(self.dispatch()) or self.sum_problem(self.combine())

    def dispatch_problem(self, got: tuple[list[Tensor], int]) -> str:
        """What is wrong with what came; also makes of it what combine wants."""
        views = got[0][: self.num_planes]
        sent = [encoded(inputs.x, self.form) for inputs in self.truth.drawn]
        for source, num_rows in enumerate(self.truth.num_received):
            came = [bits(view[source, :num_rows]) for view in views]
            here = self.truth.presence[source][:, self.stage.rank]
            if not torch.equal(_names(came), _names([plane[here] for plane in sent[source]])):
                return f"rows of rank {source}"
        rows = decoded_rows(list(views), self.form)
        self.rows.copy_(rows * factor(self.stage.rank, self.stage.setup.num_ranks))
        return ""

    def sum_problem(self, got: Tensor) -> str:
        """What is wrong with the sums."""
        difference = calc_diff(got, self.truth.summed(self.form))
        return "" if difference < _BOUND else f"sums differ by {difference:.1e}"

    def _blank(self, call: str, clock: str) -> Any:
        hidden = self.stage.setup.hidden
        there, back = row_bytes(self.form, hidden), row_bytes("bf16", hidden)
        width = {"dispatch": there, "combine": back}.get(call, there + back)
        return self.stage.blank(call, self.form, clock, width=width)


def _modules(stage: Stage) -> tuple[Any, Any, str]:
    """`flashinfer.comm`, where its memory is made, and the version.

    Raises:
        UnsupportedError: FlashInfer or a GPU is missing.
    """
    if importlib.util.find_spec("flashinfer") is None:
        raise UnsupportedError("flashinfer-python is not installed")
    if not stage.on_gpu:
        raise UnsupportedError("FlashInfer needs GPUs")
    version = importlib.import_module("flashinfer").__version__
    names = ("flashinfer.comm", "flashinfer.comm.mnnvl")
    comm, mnnvl = (importlib.import_module(name) for name in names)
    return comm, mnnvl, version


def _names(planes: list[Tensor]) -> Tensor:
    """`[rows]` int64, ascending: a number for the bytes of each row, whatever the order of rows."""
    total = torch.zeros(len(planes[0]), dtype=torch.int64, device=planes[0].device)
    for plane in planes:
        columns = torch.arange(plane.size(1), dtype=torch.int64, device=plane.device)
        total = total * 31 + (plane.long() * (2 * columns * columns + 1)).sum(1)
    return total.sort().values
