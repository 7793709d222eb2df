"""What the ranks of a benchmark do: take turns, are judged, and are timed.

Every contender sees the same inputs in the same world of processes. Its first result is judged by
the oracle, and every timed one must equal that. What is measured is a `Case`: the high-throughput
calls are in `bench_throughput.py`, the low-latency ones in `bench_low_latency.py`. Nothing here
knows how results are shown (`bench.py`).

Letters: R ranks, E experts, T tokens of a rank, K choices a token, H hidden.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock import ConfigError, reference

__all__ = [
    "Case",
    "Contender",
    "Contenders",
    "Expected",
    "Inputs",
    "RankReport",
    "run_contenders",
]

_NUM_WARMUPS = 5

_Result = TypeVar("_Result")


class Inputs(NamedTuple):
    """What one rank dispatches: `[T, H]`, `[T, K]` int64, `[T, K]` float32."""

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor


class Expected(NamedTuple):
    """What the oracle says one rank must see.

    Attributes:
        moved: Name -> what `Case.moved` must give.
        combined: `[T, H]`.
        num_rows: Rows that land here, of each rank.
    """

    moved: dict[str, Tensor]
    combined: Tensor
    num_rows: list[int]


class Contender(ABC):
    """What is measured. Both verbs are collective.

    Attributes:
        hook: The receiving half of the verb that was called last, where the verb only sends. None:
            the verb returns when its result can be used.
    """

    hook: Callable[[], None] | None = None

    @abstractmethod
    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Any:
        """Sends `x [T, H]` to the ranks of its experts.

        What it returns has an attribute `route`, for `combine`.
        """

    @abstractmethod
    def combine(self, x: Tensor, route: Any) -> Tensor:
        """Brings the experts' rows back and sums them: `[T, H]`."""

    def memory(self) -> dict[str, int]:
        """Bytes of memory that peers address, by purpose."""
        return {}


Contenders = Mapping[str, Callable[[dist.ProcessGroup, Any], Contender]]


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One measurement.

    Raises:
        ConfigError: the numbers do not go together.
    """

    num_tokens: int
    hidden: int
    num_experts: int
    num_ranks: int = 4
    num_topk: int = 8
    num_iters: int = 30
    transport: str | None = None

    def __post_init__(self) -> None:
        counts = (self.num_tokens, self.num_ranks, self.hidden, self.num_topk, self.num_iters)
        if min(counts) < 1:
            raise ConfigError("tokens, ranks, hidden, top-k and iterations must be positive")
        if self.num_experts % self.num_ranks or self.num_topk > self.num_experts:
            raise ConfigError(
                f"{self.num_experts} experts: must be a multiple of the {self.num_ranks} ranks "
                f"and at least the top-k of {self.num_topk}"
            )

    @property
    @abstractmethod
    def contenders(self) -> Contenders:
        """Name -> what makes it on a rank; the library itself is called crossdock."""

    @property
    @abstractmethod
    def combine_bound(self) -> float:
        """Largest `calc_diff` of a combined tensor from the oracle."""

    @property
    @abstractmethod
    def round_trip_bytes(self) -> int:
        """Bytes of one row there and one row back."""

    @abstractmethod
    def make_inputs(self, rank: int) -> Inputs:
        """Draws what `rank` dispatches: the same wherever it is asked for."""

    @abstractmethod
    def ask_oracle(self) -> list[Expected]:
        """Says what every rank must see."""

    @abstractmethod
    def moved(self, received: Any) -> dict[str, Tensor]:
        """What of a dispatch must be equal bit for bit, by name."""

    @abstractmethod
    def apply_experts(self, received: Any, rank: int) -> Tensor:
        """Stands for the experts of `rank`: new memory, different factors."""

    def sizes(self) -> dict[str, int]:
        """Bytes to show beside those that contenders hold, by purpose."""
        return {}

    def drawn(self, rank: int, dtype: torch.dtype) -> Inputs:
        """Uniform tokens, choices and weights."""
        generator = torch.Generator(device="cpu").manual_seed(rank)

        def draw(width: int) -> Tensor:
            size = (self.num_tokens, width)
            return torch.rand(size, generator=generator, dtype=torch.float32, device="cpu")

        x = draw(self.hidden) - 0.5
        topk_idx = draw(self.num_experts).topk(self.num_topk).indices
        return Inputs(x.to(dtype), topk_idx, draw(self.num_topk))


class Round(NamedTuple):
    """One dispatch and combine of one contender on one rank.

    Attributes:
        moved: What dispatch brought, by name.
        combined: `[T, H]`.
        times_s: Of dispatch and combine; of a contender with hooks, of both their halves.
    """

    moved: dict[str, Tensor]
    combined: Tensor
    times_s: tuple[float, ...]


class RankReport(NamedTuple):
    """What one rank measured.

    Attributes:
        num_rows: Rows that landed, the rank's own included.
        num_remote_rows: Rows that landed from other ranks.
        samples: Contender -> the times of each round: of dispatch, then as many of combine.
        refusals: Contender -> what is wrong with its result on this rank.
        about: Contender -> how it describes itself after the last round.
        memory: Contender -> what its `memory` says after the last round.
    """

    num_rows: int
    num_remote_rows: int
    samples: dict[str, list[tuple[float, ...]]]
    refusals: dict[str, str]
    about: dict[str, str]
    memory: dict[str, dict[str, int]]


def judge(got: Round, expected: Expected, bound: float) -> str | None:
    """Says what is wrong with a round, or None. Moved data must be equal bit for bit."""
    wrong = _differing(got.moved, expected.moved)
    if wrong:
        return f"dispatched {', '.join(wrong)} differ from the oracle"
    difference = reference.calc_diff(got.combined, expected.combined)
    if not difference < bound:
        return f"combine differs from the oracle by {difference:.1e}, bound {bound:.0e}"
    return None


def is_same(a: Round, b: Round) -> bool:
    """Whether two rounds gave the same bytes: what was judged once need not be judged again."""
    return torch.equal(a.combined, b.combined) and not _differing(a.moved, b.moved)


def _differing(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in wanted.items() if not torch.equal(got[name], tensor)]


def run_contenders(
    group: dist.ProcessGroup, case: Case, contenders: Contenders | None = None
) -> RankReport:
    """Judges and times every contender on this rank.

    **Collective**: every rank of the group. **Sync**: returns when all of it is done.

    Args:
        group: The ranks that take part, as many as the case says.
        case: What to measure.
        contenders: Name -> what makes it on a rank; None for those of the case.
    """
    return _Bout(group, case, case.contenders if contenders is None else contenders).run()


class _Bout:
    """The contenders of one case on one rank, taking turns."""

    def __init__(self, group: dist.ProcessGroup, case: Case, contenders: Contenders) -> None:
        self.group, self.case = group, case
        self.inputs = case.make_inputs(group.rank())
        self.expected = self._hear_oracle()
        self.contenders = {name: make(group, case) for name, make in contenders.items()}
        self.refusals: dict[str, str] = {}

    def run(self) -> RankReport:
        judged = {name: self._judged(name) for name in self.contenders}
        samples = {} if self._is_refused_anywhere() else self._time_all(judged)
        num_rows = sum(self.expected.num_rows)
        num_remote = num_rows - self.expected.num_rows[self.group.rank()]
        about = {name: repr(contender) for name, contender in self.contenders.items()}
        memory = {name: contender.memory() for name, contender in self.contenders.items()}
        return RankReport(num_rows, num_remote, samples, self.refusals, about, memory)

    def _hear_oracle(self) -> Expected:
        """Rank 0 asks for everyone: the oracle needs much memory."""
        heard: list[Any] = [None]
        told = self.case.ask_oracle() if self.group.rank() == 0 else None
        dist.scatter_object_list(heard, told, group=self.group, group_src=0)
        return heard[0]  # type: ignore[no-any-return]

    def _judged(self, name: str) -> Round:
        """A round that the oracle accepts, or a refusal.

        It owns its rows: a contender may otherwise not reuse memory that it would reuse.
        """
        each = self._play(name)
        verdict = judge(each, self.expected, self.case.combine_bound)
        if verdict is not None:
            self.refusals[name] = verdict
        return each._replace(moved={name: moved.clone() for name, moved in each.moved.items()})

    def _time_all(self, judged: Mapping[str, Round]) -> dict[str, list[tuple[float, ...]]]:
        """Rounds in turns; who begins alternates, so that none always finds the same caches."""
        samples: dict[str, list[tuple[float, ...]]] = {name: [] for name in judged}
        order = list(judged)
        for iteration in range(_NUM_WARMUPS + self.case.num_iters):
            for name in order:
                times = self._times_of_round(name, judged[name], iteration)
                if iteration >= _NUM_WARMUPS:
                    samples[name].append(times)
            order.reverse()
        return samples

    def _times_of_round(self, name: str, judged: Round, iteration: int) -> tuple[float, ...]:
        """The times of a round; its results are gone when the next one begins."""
        each = self._play(name)
        if not is_same(each, judged):
            self.refusals.setdefault(name, f"round {iteration} differs from the judged")
        return each.times_s

    def _play(self, name: str) -> Round:
        contender = self.contenders[name]
        received, there_s = self._timed(contender, lambda: contender.dispatch(*self.inputs))
        moved = self.case.moved(received)
        rows = self.case.apply_experts(received, self.group.rank())
        combined, back_s = self._timed(contender, lambda: contender.combine(rows, received.route))
        return Round(moved, combined, (*there_s, *back_s))

    def _timed(
        self, contender: Contender, verb: Callable[[], _Result]
    ) -> tuple[_Result, tuple[float, ...]]:
        """The result of a verb, and how long it took: with a hook, each half by itself."""
        result, time_s = self._clocked(verb)
        if contender.hook is None:
            return result, (time_s,)
        return result, (time_s, self._clocked(contender.hook)[1])

    def _clocked(self, run: Callable[[], _Result]) -> tuple[_Result, float]:
        """All ranks begin together; waiting for that is not timed."""
        dist.barrier(group=self.group)
        start = time.perf_counter()
        result = run()
        return result, time.perf_counter() - start

    def _is_refused_anywhere(self) -> bool:
        """Whether any rank has a refusal: all of them go on, or none does."""
        flag = torch.tensor([len(self.refusals)], dtype=torch.int32, device="cpu")
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
        return bool(flag.item())
