"""What the ranks of a benchmark do: make inputs, ask the oracle, take turns, measure.

Every contender sees the same inputs in the same world of processes. Its first result is judged by
the oracle, and every timed one must equal that. Nothing here knows how results are shown
(`bench.py`) or how the baseline works (`bench_baseline.py`).

Letters: R ranks, E experts, T tokens of a rank, K choices a token, H hidden, N rows received.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock import Buffer, ConfigError, reference
from crossdock.cli.bench_baseline import GlooBaseline, Received, TunedGlooBaseline

__all__ = [
    "COMBINE_BOUND",
    "CONTENDERS",
    "DTYPES",
    "Case",
    "Contenders",
    "RankReport",
    "ask_oracle",
    "make_inputs",
    "run_contenders",
]

COMBINE_BOUND = 5e-6
"""Largest `calc_diff` of a combined tensor from the oracle; one rounding to bf16 makes 1.4e-6."""

DTYPES = MappingProxyType({"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32})

_NUM_WARMUPS = 5


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement.

    Raises:
        ConfigError: the numbers do not go together.
    """

    num_tokens: int
    num_ranks: int = 4
    hidden: int = 4096
    dtype: str = "bf16"
    num_topk: int = 8
    num_experts: int = 64
    num_iters: int = 30
    transport: str | None = None

    def __post_init__(self) -> None:
        counts = (self.num_tokens, self.num_ranks, self.hidden, self.num_topk, self.num_iters)
        if min(counts) < 1:
            raise ConfigError("tokens, ranks, hidden, top-k and iterations must be positive")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}, must be one of {', '.join(DTYPES)}")
        if self.num_experts % self.num_ranks or self.num_topk > self.num_experts:
            raise ConfigError(
                f"{self.num_experts} experts: must be a multiple of the {self.num_ranks} ranks "
                f"and at least the top-k of {self.num_topk}"
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.hidden * DTYPES[self.dtype].itemsize


class Contender(Protocol):
    """What is measured. Both verbs are collective and return when the result can be used."""

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Received:
        """Sends `x [T, H]` to the ranks of its experts."""
        ...

    def combine(self, x: Tensor, route: Any) -> Tensor:
        """Brings `x [N, H]` back and sums it: `[T, H]`."""
        ...


Contenders = Mapping[str, Callable[[dist.ProcessGroup, Case], Contender]]


class CrossdockContender:
    """`Buffer` as a caller of DeepEP's interface uses it, without events."""

    def __init__(self, group: dist.ProcessGroup, case: Case) -> None:
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


def _baseline(group: dist.ProcessGroup, case: Case) -> GlooBaseline:
    return GlooBaseline(group, case.num_experts)


def _tuned(group: dist.ProcessGroup, case: Case) -> GlooBaseline:
    return TunedGlooBaseline(group, case.num_experts)


CONTENDERS: Contenders = MappingProxyType(
    {"crossdock": CrossdockContender, "gloo": _baseline, "gloo tuned": _tuned}
)


class Inputs(NamedTuple):
    """What one rank dispatches: `[T, H]`, `[T, K]` int64, `[T, K]` float32."""

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor


class Expected(NamedTuple):
    """What the oracle says one rank must see; `num_rows` are those it receives of each rank."""

    received: Received
    combined: Tensor
    num_rows: list[int]


class Round(NamedTuple):
    """One dispatch and combine of one contender on one rank."""

    received: Received
    combined: Tensor
    dispatch_s: float
    combine_s: float


class RankReport(NamedTuple):
    """What one rank measured.

    Attributes:
        num_rows: Rows received, the rank's own included.
        num_remote_rows: Rows received from other ranks.
        samples: Contender -> (dispatch_s, combine_s) of each timed round.
        refusals: Contender -> what is wrong with its result on this rank.
        about: Contender -> how it describes itself after the last round.
    """

    num_rows: int
    num_remote_rows: int
    samples: dict[str, list[tuple[float, float]]]
    refusals: dict[str, str]
    about: dict[str, str]


def make_inputs(case: Case, rank: int) -> Inputs:
    """Draws what `rank` dispatches: the same wherever it is asked for."""
    generator = torch.Generator(device="cpu").manual_seed(rank)

    def draw(width: int) -> Tensor:
        size = (case.num_tokens, width)
        return torch.rand(size, generator=generator, dtype=torch.float32, device="cpu")

    x = draw(case.hidden) - 0.5
    topk_idx = draw(case.num_experts).topk(case.num_topk).indices
    return Inputs(x.to(DTYPES[case.dtype]), topk_idx, draw(case.num_topk))


def apply_experts(x: Tensor, rank: int, num_ranks: int) -> Tensor:
    """Stands for the experts of `rank`: a new tensor, scaled differently on every rank."""
    return x * ((rank + 1) / num_ranks)


def ask_oracle(case: Case) -> list[Expected]:
    """Says what every rank must see."""
    ranks = range(case.num_ranks)
    xs, idxs, weights = zip(*(make_inputs(case, rank) for rank in ranks), strict=True)
    moved = reference.dispatch(xs, idxs, weights, num_experts=case.num_experts)
    received = [_as_received(each) for each in moved]
    rows = [apply_experts(received[rank].x, rank, case.num_ranks) for rank in ranks]
    returned = reference.combine(rows, idxs, case.num_experts)
    ends = moved[0].rank_prefix_matrix
    num_rows = ends.diff(dim=0, prepend=ends.new_zeros(1, case.num_ranks))
    return [
        Expected(received[rank], returned[rank].combined, num_rows[:, rank].tolist())
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


def judge(got: Round, expected: Expected) -> str | None:
    """Says what is wrong with a round, or None. Moved data must be equal bit for bit."""
    received, wanted = got.received, expected.received
    is_right = {
        "rows": torch.equal(received.x, wanted.x),
        "choices": torch.equal(received.topk_idx, wanted.topk_idx),
        "weights": torch.equal(received.topk_weights, wanted.topk_weights),
        "counts": received.num_tokens_per_expert == wanted.num_tokens_per_expert,
    }
    wrong = [name for name, right in is_right.items() if not right]
    if wrong:
        return f"dispatched {', '.join(wrong)} differ from the oracle"
    difference = reference.calc_diff(got.combined, expected.combined)
    if not difference < COMBINE_BOUND:
        return f"combine differs from the oracle by {difference:.1e}, bound {COMBINE_BOUND:.0e}"
    return None


def is_same(a: Round, b: Round) -> bool:
    """Whether two rounds gave the same bytes: what was judged once need not be judged again."""
    moved = zip(a.received[:3], b.received[:3], strict=True)
    return torch.equal(a.combined, b.combined) and all(torch.equal(*each) for each in moved)


def run_contenders(
    group: dist.ProcessGroup, case: Case, contenders: Contenders = CONTENDERS
) -> RankReport:
    """Judges and times every contender on this rank.

    **Collective**: every rank of the group. **Sync**: returns when all of it is done.

    Args:
        group: The ranks that take part, as many as the case says.
        case: What to measure.
        contenders: Name -> what makes it on a rank.
    """
    return _Bout(group, case, contenders).run()


class _Bout:
    """The contenders of one case on one rank, taking turns."""

    def __init__(self, group: dist.ProcessGroup, case: Case, contenders: Contenders) -> None:
        self.group, self.case = group, case
        self.inputs = make_inputs(case, group.rank())
        self.expected = self._hear_oracle()
        self.contenders = {name: make(group, case) for name, make in contenders.items()}
        self.refusals: dict[str, str] = {}

    def run(self) -> RankReport:
        judged = {name: self._judged(name) for name in self.contenders}
        samples = {} if self._is_refused_anywhere() else self._time_all(judged)
        num_rows = sum(self.expected.num_rows)
        num_remote = num_rows - self.expected.num_rows[self.group.rank()]
        about = {name: repr(contender) for name, contender in self.contenders.items()}
        return RankReport(num_rows, num_remote, samples, self.refusals, about)

    def _hear_oracle(self) -> Expected:
        """Rank 0 asks for everyone: the oracle needs much memory."""
        heard: list[Any] = [None]
        told = ask_oracle(self.case) if self.group.rank() == 0 else None
        dist.scatter_object_list(heard, told, group=self.group, group_src=0)
        return heard[0]  # type: ignore[no-any-return]

    def _judged(self, name: str) -> Round:
        """A round that the oracle accepts, or a refusal.

        It owns its rows: a contender may otherwise not reuse memory that it would reuse.
        """
        each = self._play(name)
        verdict = judge(each, self.expected)
        if verdict is not None:
            self.refusals[name] = verdict
        return each._replace(received=each.received._replace(x=each.received.x.clone(), route=None))

    def _time_all(self, judged: Mapping[str, Round]) -> dict[str, list[tuple[float, float]]]:
        """Rounds in turns; who begins alternates, so that none always finds the same caches."""
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in judged}
        order = list(judged)
        for iteration in range(_NUM_WARMUPS + self.case.num_iters):
            for name in order:
                times = self._timed(name, judged[name], iteration)
                if iteration >= _NUM_WARMUPS:
                    samples[name].append(times)
            order.reverse()
        return samples

    def _timed(self, name: str, judged: Round, iteration: int) -> tuple[float, float]:
        """The times of a round; its results are gone when the next one begins."""
        each = self._play(name)
        if not is_same(each, judged):
            self.refusals.setdefault(name, f"round {iteration} differs from the judged")
        return each.dispatch_s, each.combine_s

    def _play(self, name: str) -> Round:
        contender = self.contenders[name]
        dist.barrier(group=self.group)
        start = time.perf_counter()
        received = contender.dispatch(*self.inputs)
        dispatch_s = time.perf_counter() - start
        rows = apply_experts(received.x, self.group.rank(), self.group.size())
        dist.barrier(group=self.group)
        start = time.perf_counter()
        combined = contender.combine(rows, received.route)
        return Round(received, combined, dispatch_s, time.perf_counter() - start)

    def _is_refused_anywhere(self) -> bool:
        """Whether any rank has a refusal: all of them go on, or none does."""
        flag = torch.tensor([len(self.refusals)], dtype=torch.int32, device="cpu")
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
        return bool(flag.item())
