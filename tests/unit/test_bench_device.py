"""The benchmark on GPUs, without one: its arithmetic, its plan, what it refuses, what it shows.

The rank processes run the whole of it on CPU tensors; what only a GPU has is put in their place by
doubles that are as strict about order as it is.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import typer
from rich.console import Console
from typer.testing import CliRunner
from typer.testing import Result as Outcome

from crossdock import Buffer, ConfigError, reference, reference_low_latency
from crossdock.cli import bench_device_flashinfer
from crossdock.cli.bench import bench
from crossdock.cli.bench_device import device_setup, measure_chapters, run_chapter
from crossdock.cli.bench_device_cases import (
    HIGH_THROUGHPUT,
    HOOKED,
    KNOWN,
    LOW_LATENCY,
    PAIR,
    Chapter,
    Figure,
    Kernel,
    Report,
    Samples,
    Setup,
    filled,
    left_out,
    plan,
    row_bytes,
)
from crossdock.cli.bench_device_clocks import Clock, RefusedError
from crossdock.cli.bench_device_low_latency import _Calls as LowLatencyCalls
from crossdock.cli.bench_device_low_latency_views import _Calls as ViewCalls
from crossdock.cli.bench_device_picture import curves, draw
from crossdock.cli.bench_device_stage import Stage
from crossdock.cli.bench_device_tables import (
    as_json,
    kernel_table,
    low_latency_table,
    memory_table,
    missing_table,
    tables_of,
    throughput_table,
)
from crossdock.cli.bench_device_truth import Truth, bits, decoded, encode, factor
from crossdock.worlds import Pool, WorldError

CPU = torch.device("cpu")
TINY = Setup(device="cpu", num_ranks=4, hidden=256, num_experts=8, num_topk=3, num_iters=2)


def chapter(system: str, mode: str = HIGH_THROUGHPUT, num_tokens: int = 6, **more: Any) -> Chapter:
    setup = replace(TINY, **more.pop("setup", {}))
    return Chapter(setup=setup, system=system, mode=mode, num_tokens=num_tokens, **more)


def figure(**changes: Any) -> Figure:
    given = {"system": "crossdock", "mode": HIGH_THROUGHPUT, "call": "dispatch", "form": "bf16"}
    return Figure(**{**given, "num_tokens": 8, "clock": "events", **changes})


# What is measured


def test_the_most_wanted_comes_first() -> None:
    chapters = plan(TINY)
    names = [(each.system, each.mode, each.num_tokens) for each in chapters]
    cases = [(HIGH_THROUGHPUT, 4096), *((LOW_LATENCY, n) for n in (1, 16, 64, 128, 512))]
    assert names == [
        ("links", "", 0),
        ("oracle", HIGH_THROUGHPUT, 16),
        ("oracle", LOW_LATENCY, 16),
        *((system, *case) for system in ("crossdock", "FlashInfer", "NCCL") for case in cases),
    ]
    assert {(each.sms, each.forms) for each in chapters} == {((24, 128), ("fp8", "bf16"))}


def test_a_plan_follows_what_is_asked_for() -> None:
    setup = replace(TINY, with_peers=False)
    tokens = [2, 8192]
    chapters = plan(setup, modes=[LOW_LATENCY], tokens=tokens, forms=["bf16"], sms=[8])
    assert [str(each) for each in chapters] == [
        "links",
        "oracle, low-latency, 16 tokens",
        "crossdock, low-latency, 2 tokens",
    ]
    assert (chapters[2].forms, chapters[2].sms) == (("bf16",), (8,))
    assert left_out([LOW_LATENCY], tokens) == [8192]
    assert left_out([HIGH_THROUGHPUT], tokens) == []


@pytest.mark.parametrize(
    "wrong", [{"forms": ["int8"]}, {"sms": [7]}, {"sms": [0]}, {"tokens": [0]}]
)
def test_impossible_plans_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        plan(TINY, **wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"num_experts": 6}, {"num_topk": 9}, {"hidden": 200}, {"num_iters": 0}, {"budget_s": 0.0}],
)
def test_impossible_setups_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(TINY, **wrong)


def test_ranks_are_the_gpus_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_setup("cuda", None).num_ranks == 2
    assert device_setup("cuda", 1).device == "cuda"
    assert device_setup("rehearsal", None).device == "cpu"
    for device, ranks in (("cuda", 4), ("cuda", 0), ("rehearsal", 0), ("tpu", None)):
        with pytest.raises(ConfigError):
            device_setup(device, ranks)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="1 GPUs are needed, this machine has 0"):
        device_setup("cuda", None)


def test_slots_are_kept_for_more_tokens_than_come() -> None:
    assert [chapter("crossdock", num_tokens=n).num_slots for n in (1, 128, 512)] == [128, 128, 512]


# Figures


def test_a_figure_is_the_median_of_the_slowest_rank() -> None:
    ranks = [Samples([1.0, 2.0, 9.0], [5.0, 1.0, 1.0]), Samples([2.0, 1.0, 1.0], [1.0, 7.0, 1.0])]
    got = filled(figure(), ranks)
    # Slowest times 2, 2, 9; slowest hosts 5, 7, 1.
    assert (got.time_us, got.host_us, got.quartiles_us) == (2.0, 5.0, (2.0, 5.5))
    assert filled(figure(), [Samples([3.0], [])]).host_us is None


def test_bandwidth_is_bytes_by_time() -> None:
    got = figure(logical_bytes=212e6, wire_bytes=156e6, time_us=400.0)
    assert got.logical_gb_s == pytest.approx(530.0)
    assert got.wire_gb_s == pytest.approx(390.0)
    assert got.copies_us(390.0) == pytest.approx(400.0)
    assert figure(wire_bytes=156e6).wire_gb_s is None
    assert figure(time_us=3.0).wire_gb_s is None
    assert figure(wire_bytes=1.0).copies_us(None) is None


def test_rows_have_the_bytes_of_their_form() -> None:
    assert (row_bytes("bf16", 7168), row_bytes("fp8", 7168)) == (14336, 7168 + 4 * 56)


def test_traffic_is_the_mean_over_the_ranks() -> None:
    truth = Truth(TINY, 6, 0, CPU)
    counts = torch.stack([each.sum(0) for each in truth.presence])
    assert truth.traffic.rows == pytest.approx(float(counts.sum()) / 4)
    assert truth.traffic.remote_rows == pytest.approx(float(counts.sum() - counts.trace()) / 4)
    big = Truth(replace(TINY, num_experts=256, num_topk=8, hidden=128), 4096, 0, CPU)
    # Top-8 of 256 experts on four ranks: a token goes to 3.61 ranks.
    assert big.traffic.rows / 4096 == pytest.approx(3.61, abs=0.02)


# What must come of it


def worlds(num_ranks: int) -> tuple[list[Truth], Any]:
    setup = replace(TINY, num_ranks=num_ranks)
    truths = [Truth(setup, 7, rank, CPU) for rank in range(num_ranks)]
    return truths, zip(*truths[0].drawn, strict=True)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_index_operations_say_what_the_oracle_says(num_ranks: int) -> None:
    truths, (xs, idxs, weights) = worlds(num_ranks)
    moved = reference.dispatch(xs, idxs, weights, num_experts=TINY.num_experts)
    rows = [each.recv_x * factor(rank, num_ranks) for rank, each in enumerate(moved)]
    returned = reference.combine(rows, idxs, TINY.num_experts)
    for truth, there, back in zip(truths, moved, returned, strict=True):
        assert torch.equal(truth.landed(xs), there.recv_x)
        assert torch.equal(truth.choices, there.recv_topk_idx)
        assert torch.equal(truth.weights, there.recv_topk_weights)
        assert truth.expert_counts == there.num_recv_tokens_per_expert
        assert sum(truth.num_received) == len(there.recv_x)
        assert torch.equal(xs[truth.rank][truth.sent_tokens], truth.mine.x[truth.sent_tokens])
        assert reference.calc_diff(truth.summed(), back.combined) < 1e-12


@pytest.mark.parametrize("form", ["fp8", "bf16"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_slabs_are_those_of_the_oracle(num_ranks: int, form: str) -> None:
    truths, (xs, idxs, _) = worlds(num_ranks)
    slabs = reference_low_latency.dispatch(xs, idxs, num_experts=TINY.num_experts, format=form)
    for truth, expected in zip(truths, slabs, strict=True):
        expert, place, origin = truth.pairs
        planes = list(zip(*(encode(x) if form == "fp8" else (x,) for x in xs), strict=True))
        payload = torch.cat([bits(plane) for plane in planes[0]])[origin]
        assert torch.equal(payload, torch.cat([bits(rows) for rows in expected.rows]))
        if expected.scales is not None:
            assert torch.equal(torch.cat(planes[1])[origin], torch.cat(expected.scales))
        counts = expected.recv_count
        assert torch.bincount(expert, minlength=len(counts)).tolist() == counts
        assert place.tolist() == [n for count in counts for n in range(count)]


@pytest.mark.parametrize("form", ["fp8", "bf16"])
def test_weighted_sums_are_those_of_the_oracle(form: str) -> None:
    truths, (xs, idxs, weights) = worlds(2)
    outputs = []
    for truth in truths:
        expert, _, origin = truth.pairs
        rows = torch.cat([decoded(x, form) for x in xs])[origin]
        numbers = expert + truth.rank * truth.setup.num_local
        rows = (rows * factor(numbers.float(), 8).unsqueeze(1)).to(torch.bfloat16)
        outputs.append(list(rows.split(torch.bincount(expert, minlength=4).tolist())))
    returned = reference_low_latency.combine(outputs, idxs, weights, num_experts=8)
    for truth, back in zip(truths, returned, strict=True):
        assert reference.calc_diff(truth.weighted(form), back.combined) < 1e-12


# What the ranks do


def measured(pool: Pool, asked: Chapter, remaining_s: float = 60.0) -> Report:
    ranks = asked.setup.num_ranks
    report: Report = pool.run(run_chapter, asked, remaining_s, num_ranks=ranks)[0]
    return report


def whys(report: Report) -> set[str]:
    return {each.why for each in report.figures if each.why}


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_high_throughput_calls_are_measured(pool: Pool, num_ranks: int) -> None:
    asked = chapter("crossdock", setup={"num_ranks": num_ranks})
    report = measured(pool, asked)
    assert whys(report) == set()
    names = [
        "layout",
        *(["dispatch"] * 2),
        "dispatch, cached",
        "dispatch, fixed rows",
        *(["dispatch, views"] * 2),
        "dispatch, cached",
        "combine",
    ]
    assert [(each.call, each.num_sms) for each in report.figures] == [
        (name, sms) for sms in (24, 128) for name in names
    ]
    truth = Truth(asked.setup, 6, 0, CPU)
    fp8 = report.figures[2]
    assert (fp8.form, fp8.num_tokens) == ("fp8", 6)
    assert fp8.logical_bytes == pytest.approx(truth.traffic.rows * (256 + 8))
    assert fp8.wire_bytes == pytest.approx(truth.traffic.remote_rows * (256 + 8))
    assert all(each.time_us > 0 and each.host_us > 0 for each in report.figures)  # type: ignore[operator]
    assert report.memory[str(asked)]["peer-addressable"] > 0
    assert "transport one_sided" in report.about[str(asked)]


def test_low_latency_calls_are_measured(pool: Pool) -> None:
    asked = chapter("crossdock", LOW_LATENCY, forms=("fp8",))
    report = measured(pool, asked)
    assert [(each.call, each.clock) for each in report.figures] == [
        (PAIR, "wall"), (HOOKED, "wall"), (PAIR, "graph"), (KNOWN, "graph"), (HOOKED, "graph"),
        ("dispatch", "graph"), ("combine", "graph"),
        (PAIR, "wall"), (PAIR, "graph"), ("dispatch", "graph"),
    ]  # fmt: skip
    assert [each.system for each in report.figures] == ["crossdock"] * 7 + ["crossdock, views"] * 3
    assert all(each.time_us for each in [*report.figures[:2], report.figures[7]])
    assert whys(report) == {"UnsupportedError: a CUDA graph needs a GPU"}
    assert report.memory[str(asked)]["fp8 slabs"] == 2 * 4 * 128 * (256 + 8)
    rows = 4 * 6 * 256  # of six tokens of each rank, at least, and a landing zone holds more
    assert report.memory[str(asked)]["peer-addressable"] > rows
    assert report.is_healthy


def test_the_plain_exchange_is_measured(pool: Pool) -> None:
    report = measured(pool, chapter("NCCL"))
    assert whys(report) == set()
    assert [(each.system, each.call, each.form) for each in report.figures] == [
        ("NCCL", "dispatch", "fp8"), ("NCCL, gather, sum", "dispatch", "fp8"),
        ("NCCL", "dispatch", "bf16"), ("NCCL, gather, sum", "dispatch", "bf16"),
        ("NCCL", "combine", "bf16"), ("NCCL, gather, sum", "combine", "bf16"),
    ]  # fmt: skip


def test_links_and_flashinfer_need_gpus(pool: Pool) -> None:
    (links,) = measured(pool, chapter("links", "", 0)).figures
    assert links.why == "UnsupportedError: copies between devices need two GPUs"
    (peer,) = measured(pool, chapter("FlashInfer")).figures
    assert peer.why == "UnsupportedError: flashinfer-python is not installed"


@pytest.mark.parametrize("mode", [HIGH_THROUGHPUT, LOW_LATENCY])
def test_the_oracle_is_asked(pool: Pool, mode: str) -> None:
    report = measured(pool, chapter("oracle", mode))
    assert report.figures == []
    assert set(report.about.values()) == {"what the library returns is right"}


def test_nothing_is_begun_when_the_time_is_up(pool: Pool) -> None:
    report = measured(pool, chapter("NCCL"), remaining_s=-1.0)
    assert whys(report) == {"skipped: the budget of time is spent"}
    assert all(each.time_us is None for each in report.figures)


@contextlib.contextmanager
def spoilt(name: str, fault: Callable[[Any], Any]) -> Iterator[None]:
    """A call of the library whose results are changed on the last rank."""
    original = getattr(Buffer, name)

    def call(self: Buffer, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        return fault(result) if self.rank == self.group_size - 1 else result

    setattr(Buffer, name, call)
    try:
        yield
    finally:
        setattr(Buffer, name, original)


def flip_rows(result: Any) -> Any:
    rows = result[0] if isinstance(result[0], torch.Tensor) else result[0][0]
    bits(rows).view(-1)[0] ^= 1
    return result


def double_a_scale(result: Any) -> Any:
    if isinstance(result[0], tuple):
        result[0][1].view(-1)[0] *= 2
    return result


def turn_sums(result: Any) -> Any:
    return (result[0].flip(0), *result[1:])


def double_scales(result: Any) -> Any:
    if isinstance(result[0], tuple):
        result[0][1].mul_(2)
    return result


def double_viewed_scales(result: Any) -> Any:
    result[0].tokens[1].mul_(2)
    return result


def forget_rows(result: Any) -> Any:
    result[0].src_idx.fill_(-1)
    return result


FAULTS = {
    "rows": ("dispatch", flip_rows),
    "scales": ("dispatch", double_a_scale),
    "sums": ("combine", turn_sums),
    "slab scales": ("low_latency_dispatch", double_scales),
    "weighted sums": ("low_latency_combine", turn_sums),
    "viewed rows": ("low_latency_dispatch_views", double_viewed_scales),
    "viewed slots": ("low_latency_dispatch_views", forget_rows),
    "sums of views": ("low_latency_combine_views", turn_sums),
}


def spoilt_chapter(group: dist.ProcessGroup, asked: Chapter, fault: str) -> Report:
    with spoilt(*FAULTS[fault]):
        return run_chapter(group, asked, 60.0)


@pytest.mark.parametrize(
    ("fault", "wrong"),
    [
        ("rows", {"dispatch bf16": "rows", "dispatch fp8": "rows"}),
        ("scales", {"dispatch fp8": "rows"}),
        ("sums", {"combine bf16": "sums differ by"}),
    ],
)
def test_wrong_results_are_refused(pool: Pool, fault: str, wrong: dict[str, str]) -> None:
    report = pool.run(spoilt_chapter, chapter("crossdock", sms=(24,)), fault)[0]
    told = {f"{each.call} {each.form}": each for each in report.figures}
    for name, what in wrong.items():
        assert told[name].why.startswith(f"wrong result: {what}")
        assert told[name].why.endswith("(rank 3)")
        assert told[name].is_wrong
        assert told[name].time_us is None
    assert told["layout bf16"].time_us


@pytest.mark.parametrize(
    ("fault", "what"),
    [("slab scales", "rows or scales"), ("weighted sums", "sums differ by")],
)
def test_wrong_slabs_are_refused(pool: Pool, fault: str, what: str) -> None:
    asked = chapter("crossdock", LOW_LATENCY, forms=("fp8",))
    is_dispatch_right, why = pool.run(spoilt_slabs, asked, fault)[0]
    assert is_dispatch_right == (what != "rows or scales")
    assert why.startswith(f"wrong result: {what}")


def spoilt_slabs(group: dist.ProcessGroup, asked: Chapter, fault: str) -> Any:
    """Whether a dispatch is right, and the reason why something is not."""
    with (
        spoilt(*FAULTS[fault]),
        Stage(group, asked, remaining_s=60.0) as stage,
        stage.buffer(low_latency_mode=True) as buffer,
    ):
        calls = LowLatencyCalls(stage, buffer, form="fp8")
        there = calls.one("dispatch", calls.dispatch, calls.dispatch_problem, clock="wall")
        back = calls.one("combine", calls.combine, calls.combine_problem, clock="wall")
    return there.time_us is not None, there.why or back.why


@pytest.mark.parametrize(
    ("fault", "what"),
    [("viewed rows", "rows of rank 0"), ("viewed slots", "which rows"), ("sums of views", "sums")],
)
def test_wrong_views_are_refused(pool: Pool, fault: str, what: str) -> None:
    asked = chapter("crossdock", LOW_LATENCY, forms=("fp8",))
    assert pool.run(spoilt_views, asked, fault)[3].startswith(what)


def spoilt_views(group: dist.ProcessGroup, asked: Chapter, fault: str) -> str:
    """What is found wrong with a dispatch, or with both calls."""
    with (
        Stage(group, asked, remaining_s=60.0) as stage,
        stage.buffer(low_latency_mode=True) as buffer,
    ):
        calls = ViewCalls(stage, buffer, "fp8")
        right = calls.dispatch_problem(calls.dispatch()) or calls.sum_problem(calls.pair())
        with spoilt(*FAULTS[fault]):
            if fault == "sums of views":
                return right or calls.sum_problem(calls.pair())
            return right or calls.dispatch_problem(calls.dispatch())


@pytest.mark.parametrize(
    ("mode", "fault"), [(HIGH_THROUGHPUT, "rows"), (LOW_LATENCY, "weighted sums")]
)
def test_the_oracle_refuses(pool: Pool, mode: str, fault: str) -> None:
    report = pool.run(spoilt_chapter, chapter("oracle", mode, forms=("bf16",)), fault)[0]
    (refused,) = report.figures
    assert refused.is_wrong
    assert refused.system == "crossdock"
    assert "oracle" in refused.why


def fail_on_one(group: dist.ProcessGroup, at_rank: int) -> list[str]:
    clock = Clock(group, group, device=CPU, num_iters=2)

    def call() -> int:
        if at_rank in (group.rank(), -1):
            raise ValueError("no such thing")
        return 1

    with pytest.raises(RefusedError) as caught:
        clock.events(call, lambda _: "")
    return clock.gathered(str(caught.value))


def test_all_ranks_hear_of_a_failure(pool: Pool) -> None:
    assert pool.run(fail_on_one, 2)[0] == ["ValueError: no such thing (rank 2)"] * 4
    assert pool.run(fail_on_one, -1)[0] == ["ValueError: no such thing"] * 4


class FakePool(contextlib.nullcontext["FakePool"]):
    """Breaks in the chapter with two tokens, and falls ill in that with three."""

    def __init__(self, num_ranks: int) -> None:
        super().__init__()
        self.enter_result, self.num_closed = self, 0

    def run(self, fn: Any, asked: Chapter, remaining_s: float, *, timeout_s: float) -> Any:
        assert 30.0 < timeout_s <= min(120.0, remaining_s + 30.0)
        if asked.num_tokens == 2:
            raise WorldError({1: "Traceback:\n  File ...\nOSError: lost\n"}, {})
        done = figure(num_tokens=asked.num_tokens, why=f"after {self.num_closed}")
        return [Report(figures=[done], is_healthy=asked.num_tokens != 3)] * 4

    def close(self) -> None:
        self.num_closed += 1


def test_a_chapter_that_breaks_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossdock.cli.bench_device.Pool", FakePool)
    report, told = Report(), []
    chapters = [chapter("NCCL", num_tokens=n) for n in (1, 2, 3, 4)]
    measure_chapters(chapters, report, lambda each, _: told.append(each.num_tokens))
    assert [(each.num_tokens, each.why) for each in report.figures] == [
        (1, "after 0"), (2, "OSError: lost"), (3, "after 1"), (4, "after 2"),
    ]  # fmt: skip
    assert told == [1, 2, 3, 4]


def test_a_buffer_that_cannot_be_made_is_told(pool: Pool) -> None:
    (missing,) = measured(pool, chapter("crossdock", setup={"transport": "pigeon"})).figures
    assert missing.why.startswith("UnsupportedError: no transport 'pigeon'")


def test_chapters_without_time_are_skipped() -> None:
    report = Report()
    chapters = [chapter("NCCL", num_tokens=n, setup={"budget_s": 1e-9}) for n in (1, 2)]
    measure_chapters(chapters, report, lambda *_: None)
    assert [each.why for each in report.figures] == ["skipped: the budget of time is spent"] * 2


# Doubles of what only a GPU has


class FakeEvent:
    """Tells the time that the stream has been told."""

    stream_ms = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        self.at_ms: float | None = None

    def record(self) -> None:
        self.at_ms = FakeEvent.stream_ms

    def synchronize(self) -> None:
        if self.at_ms is None:
            raise RuntimeError("was not recorded")

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.at_ms - self.at_ms  # type: ignore[operator]


class FakeGraph:
    """Replays in 5 ms what was captured in it."""

    def __init__(self) -> None:
        self.num_calls = 0

    def replay(self) -> None:
        FakeEvent.stream_ms += 0.5 * self.num_calls


@contextlib.contextmanager
def fake_capture(graph: FakeGraph, *, capture_error_mode: str) -> Iterator[None]:
    before = FakeCalls.num_calls
    yield
    graph.num_calls = FakeCalls.num_calls - before


class FakeCalls:
    num_calls = 0

    @classmethod
    def call(cls) -> int:
        cls.num_calls += 1
        return cls.num_calls


def take_graph_time(group: dist.ProcessGroup, problem: str) -> Samples:
    fakes = {
        "CUDAGraph": FakeGraph, "graph": fake_capture, "Event": FakeEvent,
        "synchronize": lambda _: None,
    }  # fmt: skip
    clock = Clock(group, group, device=CPU, num_iters=2)
    clock.device = torch.device("cuda", 0)
    with pytest.MonkeyPatch.context() as patch:
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)
        return clock.graph(FakeCalls.call, lambda got: problem if got == 12 else "another result")


def test_a_graph_is_timed_by_the_call(pool: Pool) -> None:
    (samples,) = pool.run(take_graph_time, "", num_ranks=1)
    assert samples == Samples([pytest.approx(500.0)] * 15, [])


class FakeFlashInfer:
    """`flashinfer.comm` over gloo: rows of a source lie in no order, in memory that is kept."""

    def __init__(self, group: dist.ProcessGroup, fault: str) -> None:
        self.group, self.fault, self.routes = group, fault, {}
        self.Mapping = self.MnnvlConfig = self.TorchDistBackend = SimpleNamespace
        self.TorchDistBackend = lambda group: group

    def MoeAlltoAll(  # noqa: N802
        self, mapping: Any, max_num_tokens: int, top_k: int, num_experts: int, *,
        hidden_size: int, mnnvl_config: Any,
    ) -> Any:  # fmt: skip
        assert mapping.moe_ep_size == mapping.tp_size == mapping.world_size
        assert mnnvl_config.comm_backend is self.group
        size = mapping.world_size * max_num_tokens * (4 * hidden_size + 8 * top_k)
        workspace = torch.zeros((mapping.world_size, size), dtype=torch.uint8)
        return SimpleNamespace(
            workspace=workspace, metainfo=torch.zeros(1), workspace_size_per_rank=size
        )

    def moe_a2a_dispatch(
        self, ids: Any, payloads: Any, workspace: Any, metainfo: Any, most: int, rank: int,
        num_ranks: int, top_k: int, num_experts: int,
    ) -> Any:  # fmt: skip
        assert ids.dtype == torch.int32
        owner = ids // (num_experts // num_ranks)
        tokens = [(owner == dst).any(1).nonzero()[:, 0].tolist() for dst in range(num_ranks)]
        for each in tokens:
            random.shuffle(each)
        self.tokens = tokens
        told: list[Any] = [None] * num_ranks
        sent = [[payload[tokens[dst]] for payload in payloads] for dst in range(num_ranks)]
        dist.all_gather_object(told, sent, group=self.group)
        views, offset = [], 0
        for number, payload in enumerate(payloads):
            nbytes = num_ranks * most * payload.size(1) * payload.itemsize
            view = self.moe_a2a_wrap_payload_tensor_in_workspace(
                workspace[rank], [num_ranks, most], offset, offset + nbytes, payload.dtype
            )
            for source in range(num_ranks):
                rows = told[source][rank][number]
                rows = rows.roll(1, 0) if number == 1 and self.fault == "scales" else rows
                view[source, : len(rows)] = rows
            views.append(view)
            offset += nbytes
        return views, offset, None

    def moe_a2a_wrap_payload_tensor_in_workspace(
        self, memory: Any, shape: Any, begin: int, end: int, dtype: Any
    ) -> Any:
        return memory[begin:end].view(dtype).view(*shape, -1)

    def moe_a2a_combine(
        self, rows: Any, num_tokens: int, workspace: Any, metainfo: Any, most: int, rank: int,
        num_ranks: int, top_k: int, offset: int, *, payload_in_workspace: bool, output: Any,
    ) -> Any:  # fmt: skip
        assert rows.data_ptr() == workspace[rank].data_ptr() + offset
        told: list[Any] = [None] * num_ranks
        dist.all_gather_object(told, rows.clone(), group=self.group)
        total = torch.zeros(output.shape)
        for dst, tokens in enumerate(self.tokens):
            total[tokens] += told[dst][rank, : len(tokens)].float()
        output.copy_(total.flip(0) if self.fault == "sums" else total)
        return output


def flashinfer_chapter(group: dist.ProcessGroup, asked: Chapter, fault: str) -> Report:
    fake = FakeFlashInfer(group, fault)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_device_flashinfer, "_modules", lambda _: (fake, fake, "0"))
        return run_chapter(group, asked, 60.0)


def test_flashinfer_is_measured(pool: Pool) -> None:
    report = pool.run(flashinfer_chapter, chapter("FlashInfer"), "")[0]
    assert whys(report) == set()
    assert [(each.call, each.form) for each in report.figures] == [
        ("dispatch", "fp8"), ("combine", "fp8"), ("dispatch", "bf16"), ("combine", "bf16"),
    ]  # fmt: skip
    few = chapter("FlashInfer", LOW_LATENCY, 1, setup={"num_ranks": 2})
    report = pool.run(flashinfer_chapter, few, "", num_ranks=2)[0]
    assert whys(report) == {"UnsupportedError: a CUDA graph needs a GPU"}
    walls = [each for each in report.figures if each.clock == "wall"]
    assert [(each.call, each.form) for each in walls] == [(PAIR, "fp8"), (PAIR, "bf16")]
    assert all(each.host_us for each in walls)


@pytest.mark.parametrize(
    ("fault", "form", "what"), [("scales", "fp8", "rows of rank"), ("sums", "bf16", "sums differ")]
)
def test_flashinfer_is_judged(pool: Pool, fault: str, form: str, what: str) -> None:
    report = pool.run(flashinfer_chapter, chapter("FlashInfer", num_tokens=9), fault)[0]
    told = [each.why for each in report.figures if each.form == form]
    assert any(why.startswith(f"wrong result: {what}") for why in told)


# How it is shown


def a_report() -> Report:
    events = {"wire_bytes": 156e6, "logical_bytes": 208e6}
    graph = {"mode": LOW_LATENCY, "form": "fp8", "num_tokens": 16}
    return Report(
        figures=[
            figure(time_us=500.0, host_us=30.0, num_sms=24, **events),
            figure(time_us=450.0, host_us=31.0, num_sms=128, **events),
            figure(time_us=480.0, system="FlashInfer", **events),
            figure(call="layout", time_us=7.0),
            figure(call=PAIR, clock="graph", time_us=40.0, wire_bytes=3.9e6, **graph),
            figure(call=PAIR, clock="wall", time_us=60.0, host_us=55.0, wire_bytes=3.9e6, **graph),
            figure(call="dispatch", clock="graph", time_us=19.0, **graph),
            figure(system="NCCL", why="ValueError: too few\nand more"),
            *(figure(system="NCCL", num_tokens=n, why="skipped") for n in range(1, 9)),
        ],
        kernels=[Kernel(figure(num_sms=24), "_send", 1.0, 333.3)],
        memory={"crossdock, low-latency": {"peer-addressable": 30_000_000}},
        about={"crossdock": "a buffer"},
        link_gb_s=390.0,
    )


def cells(table: Any) -> list[list[str]]:
    return [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]


def test_single_calls_are_shown_beside_copies() -> None:
    rows = cells(throughput_table(a_report(), TINY))
    assert [row[1:5] for row in rows] == [
        ["layout", "bf16", "crossdock", "-"],
        ["dispatch", "bf16", "FlashInfer", "-"],
        ["dispatch", "bf16", "crossdock", "24"],
        ["dispatch", "bf16", "crossdock", "128"],
    ]
    assert rows[3][5:] == ["450.0", "31.0", "462.2", "346.7", "400.0"]
    assert rows[0][5:] == ["7.0", "-", "-", "-", "-"]


def test_copies_are_called_no_limit() -> None:
    for table in (throughput_table(a_report(), TINY), low_latency_table(a_report(), TINY)):
        assert not [str(column.header) for column in table.columns if "limit" in str(column.header)]
        assert "390 GB/s, which copies to all other ranks at once got" in str(table.caption)
        assert str(table.caption).count("limit") == str(table.caption).count("no limit") == 1


def test_graphs_are_shown_in_one_row() -> None:
    (row,) = cells(low_latency_table(a_report(), TINY))
    times = ["40.0", "-", "-", "19.0", "-", "60.0", "-", "55.0"]
    assert row == ["16", "fp8", "crossdock", *times, "10.0", "-", "97.5"]


def test_what_is_missing_is_shown_with_the_reason() -> None:
    first, second = cells(missing_table(a_report()))
    name = "NCCL, high-throughput, 8 tokens, dispatch, bf16, events"
    assert first == [name, "ValueError: too few"]
    assert second[1] == "skipped"
    assert second[0].splitlines()[5:] == [name.replace("8", "6"), "and 2 more"]


def test_memory_and_kernels_are_shown() -> None:
    assert cells(memory_table(a_report())) == [
        ["crossdock, low-latency", "peer-addressable", "30.0"]
    ]
    (row,) = cells(kernel_table(a_report()))
    assert row[1:] == ["_send", "1.0", "333.3"]
    assert row[0].endswith("24 SMs, events")


def test_empty_tables_are_left_out() -> None:
    assert len(list(tables_of(a_report(), TINY))) == 5
    assert list(tables_of(Report(), TINY)) == []


def test_json_holds_everything() -> None:
    document = json.loads(as_json(a_report(), TINY, {"gpu": "abacus"}))
    assert document["machine"] == {"gpu": "abacus"}
    assert document["setup"]["hidden"] == 256
    assert document["copies_gb_s"] == 390.0
    assert document["figures"][1]["copies_us"] == pytest.approx(400.0)
    assert document["figures"][1]["wire_gb_s"] == pytest.approx(346.67, abs=0.01)
    assert document["figures"][7]["why"] == "ValueError: too few\nand more"
    assert document["kernels"][0]["name"] == "_send"
    assert document["memory"]["crossdock, low-latency"] == {"peer-addressable": 30_000_000}


def test_curves_take_the_most_sms() -> None:
    shown = curves(a_report(), "dispatch")
    assert shown == {
        ("crossdock", "bf16", HIGH_THROUGHPUT): [(8, 450.0)],
        ("FlashInfer", "bf16", HIGH_THROUGHPUT): [(8, 480.0)],
        ("crossdock", "fp8", LOW_LATENCY): [(16, 19.0)],
    }
    assert curves(a_report(), "combine") == {}


@pytest.mark.parametrize("report", [a_report(), Report()], ids=["full", "empty"])
def test_a_picture_is_drawn(report: Report, tmp_path: Path) -> None:
    draw(report, TINY, tmp_path / "latency.png")
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")


# The command


def run_command(*arguments: str) -> Outcome:
    app = typer.Typer()
    app.command()(bench)
    return CliRunner().invoke(app, arguments)


SIZES = (
    "--device=rehearsal", "--ranks=2", "--tokens=3", "--hidden=128", "--experts=4", "--top-k=2",
    "--iters=1", "--mode=high-throughput",
)  # fmt: skip


def test_the_command_rehearses(tmp_path: Path) -> None:
    figures, picture = tmp_path / "figures.json", tmp_path / "latency.png"
    outcome = run_command(*SIZES, f"--json={figures}", f"--picture={picture}", "--sms=8")
    assert outcome.exit_code == 0, outcome.output
    assert "REHEARSED ON A CPU" in outcome.output
    assert "flashinfer-python is not installed" in outcome.output
    assert picture.exists()
    document = json.loads(figures.read_text(encoding="utf-8"))
    told = {(each["system"], each["num_sms"]) for each in document["figures"] if each["time_us"]}
    assert told == {("crossdock", 8), ("NCCL", None), ("NCCL, gather, sum", None)}
    assert document["machine"]["cpu"]


def test_the_command_says_that_there_are_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    outcome = run_command(*SIZES, "--device=cpu")
    assert outcome.exit_code == 0, outcome.output
    assert "--device cuda measures on them" in outcome.output
    assert "REHEARSED" not in outcome.output


def test_a_wrong_result_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(chapters: Any, console: Console, facts: Any, **paths: Any) -> Report:
        return Report(figures=[figure(why="wrong result: rows")])

    monkeypatch.setattr("crossdock.cli.bench.bench_device", wrong)
    outcome = run_command(*SIZES)
    assert outcome.exit_code == 1
    assert "refused: wrong result: rows" in outcome.output


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--device=tpu"], "device is 'tpu', must be one of cpu, cuda, rehearsal"),
        (["--device=rehearsal", "--format=int8"], "format is 'int8', must be one of fp8, bf16"),
        (["--device=rehearsal", "--sms=7"], "SM counts must be positive and even"),
        (["--device=rehearsal", "--experts=6"], "6 experts: must be a multiple of the 4 ranks"),
    ],
)
def test_the_command_refuses_with_a_reason(arguments: list[str], reason: str) -> None:
    outcome = run_command(*arguments)
    assert outcome.exit_code == 1
    assert f"refused: {reason}" in " ".join(outcome.output.split())
