"""The benchmark: its baseline is right, its statistics are, and a wrong result is not timed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import typer
from typer.testing import CliRunner
from typer.testing import Result as Outcome

from crossdock import ConfigError, ShapeError, reference, reference_low_latency
from crossdock.cases import ROUTING_CASES
from crossdock.cli.bench import WrongResultError, as_json, bench, summarise
from crossdock.cli.bench_baseline import GlooBaseline, Received
from crossdock.cli.bench_low_latency import (
    FORMATS,
    LowLatency,
    result_bytes,
    slot_buffer_bytes,
)
from crossdock.cli.bench_low_latency_baseline import GlooSlabs, Slabs, TunedGlooSlabs
from crossdock.cli.bench_tables import Result, halves_table, memory_table, tables_of, times_table
from crossdock.cli.bench_throughput import CONTENDERS, DTYPES, Throughput
from crossdock.cli.bench_world import Contenders, RankReport, run_contenders
from crossdock.worlds import Pool

TINY = Throughput(num_tokens=5, hidden=16, num_topk=3, num_experts=8, num_iters=2)
TINY_SLABS = LowLatency(num_tokens=5, hidden=128, num_topk=3, num_experts=8, num_iters=2)


class Sabotaged(GlooBaseline):
    """The baseline with one fault, from its `first_bad` round on."""

    def __init__(self, group: dist.ProcessGroup, *, fault: str, first_bad: int = 0) -> None:
        super().__init__(group, TINY.num_experts)
        self.fault, self.rounds_to_go = fault, first_bad

    def dispatch(self, *inputs: Any) -> Received:
        self.rounds_to_go -= 1
        received = super().dispatch(*inputs)
        is_bad = self.rounds_to_go < 0 and self.rank == self.num_ranks - 1
        return self.spoilt(received) if is_bad else received

    def spoilt(self, received: Received) -> Received:
        if self.fault == "rows":
            received.x[0, 0] += 1
        if self.fault == "choices":
            received.topk_idx[0] = received.topk_idx[0].flip(0)
        if self.fault == "weights":
            received.topk_weights[0] += 1
        if self.fault == "counts":
            received.num_tokens_per_expert[0] += 1
        return received

    def combine(self, x: torch.Tensor, route: Any) -> torch.Tensor:
        combined = super().combine(x, route)
        return combined.flip(0) if self.fault == "sums" else combined


def sabotaged_bout(group: dist.ProcessGroup, fault: str, first_bad: int) -> RankReport:
    contenders: Contenders = {
        "crossdock": CONTENDERS["crossdock"],
        "bad": lambda group, _: Sabotaged(group, fault=fault, first_bad=first_bad),
    }
    return run_contenders(group, TINY, contenders)


@pytest.mark.parametrize("fault", ["rows", "choices", "weights", "counts", "sums"])
def test_a_wrong_result_is_refused_and_nothing_is_timed(pool: Pool, fault: str) -> None:
    reports = pool.run(sabotaged_bout, fault, 0)
    assert [report.samples for report in reports] == [{}] * 4
    assert list(reports[3].refusals) == ["bad"]
    with pytest.raises(WrongResultError, match=r"bad on rank 3: .* the oracle"):
        summarise(TINY, reports)


def test_a_result_that_goes_wrong_later_is_refused(pool: Pool) -> None:
    reports = pool.run(sabotaged_bout, "rows", 4)
    with pytest.raises(WrongResultError, match="bad on rank 3: round 3 differs from the judged"):
        summarise(TINY, reports)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_bout_is_measured(pool: Pool, num_ranks: int, dtype: str) -> None:
    case = replace(TINY, num_ranks=num_ranks, dtype=dtype)
    reports = pool.run(run_contenders, case, num_ranks=num_ranks)
    result = summarise(case, reports)
    assert result.ratios["crossdock"] == 1.0
    for name in CONTENDERS:
        assert [len(report.samples[name]) for report in reports] == [2] * num_ranks
        assert result.figures[name].total_ms > 0
    expected = [sum(each.num_rows) for each in case.ask_oracle()]
    assert [report.num_rows for report in reports] == expected


def baseline_round(group: dist.ProcessGroup, case: str) -> tuple[Received, torch.Tensor]:
    routing = ROUTING_CASES[case].make(group.size())
    baseline = GlooBaseline(group, routing.num_experts)
    received = baseline.dispatch(*routed_inputs(case, group.size())[group.rank()])
    return received._replace(route=None), baseline.combine(received.x, received.route)


def routed_inputs(case: str, num_ranks: int) -> list[tuple[torch.Tensor, ...]]:
    inputs = []
    for rank, idx in enumerate(ROUTING_CASES[case].make(num_ranks).topk_idxs):
        drawn = replace(TINY, num_tokens=max(len(idx), 1)).make_inputs(rank)
        weights = torch.ones(idx.shape, dtype=torch.float32) * (rank + 1)
        inputs.append((drawn.x[: len(idx)], idx, weights))
    return inputs


@pytest.mark.parametrize("case", [name for name in ROUTING_CASES if name != "nobody"])
def test_the_baseline_equals_the_oracle(pool: Pool, case: str) -> None:
    """A baseline that only works on easy routings would not be a fair one."""
    xs, idxs, weights = zip(*routed_inputs(case, 4), strict=True)
    num_experts = ROUTING_CASES[case].make(4).num_experts
    moved = reference.dispatch(xs, idxs, weights, num_experts=num_experts)
    returned = reference.combine([each.recv_x for each in moved], idxs, num_experts)
    for rank, (received, combined) in enumerate(pool.run(baseline_round, case)):
        assert torch.equal(received.x, moved[rank].recv_x)
        assert torch.equal(received.topk_idx, moved[rank].recv_topk_idx)
        assert torch.equal(received.topk_weights, moved[rank].recv_topk_weights)
        assert received.num_tokens_per_expert == moved[rank].num_recv_tokens_per_expert
        assert reference.calc_diff(combined, returned[rank].combined) < 5e-6


class SabotagedSlabs(GlooSlabs):
    """The low-latency baseline with one fault."""

    fault = ""

    def dispatch(self, *inputs: Any) -> Slabs:
        received = super().dispatch(*inputs)
        if self.carrier.rank == self.carrier.num_ranks - 1:
            expert = int(received.recv_count.argmax())
            if self.fault == "rows":
                received.payload.view(torch.uint8)[expert, 0, 0] ^= 1
            if self.fault == "scales":
                received.scales[expert, 0] *= 2
            if self.fault == "counts":
                received.recv_count[expert] -= 1
        return received

    def combine(self, x: torch.Tensor, route: Any) -> torch.Tensor:
        if self.fault == "weights":
            route = route._replace(weights=route.weights.flip(0))
        return super().combine(x, route)


def sabotaged_slabs_bout(group: dist.ProcessGroup, fault: str, form: str) -> RankReport:
    def make(group: dist.ProcessGroup, case: LowLatency) -> GlooSlabs:
        made = SabotagedSlabs(group, 8, num_slots=case.num_tokens, form=case.form)
        made.fault = fault
        return made

    return run_contenders(group, replace(TINY_SLABS, form=form), {"bad": make})


@pytest.mark.parametrize(
    ("fault", "form", "reason"),
    [
        ("rows", "fp8", "dispatched rows differ"),
        ("rows", "bf16", "dispatched rows differ"),
        ("scales", "fp8", "dispatched scales differ"),
        ("scales", "int8", "dispatched scales differ"),
        ("counts", "fp8", "dispatched counts, rows, scales differ"),
        ("weights", "fp8", "combine differs"),
    ],
)
def test_wrong_slabs_are_refused(pool: Pool, fault: str, form: str, reason: str) -> None:
    reports = pool.run(sabotaged_slabs_bout, fault, form)
    assert [report.samples for report in reports] == [{}] * 4
    with pytest.raises(WrongResultError, match=f"bad on rank 3: {reason}"):
        summarise(TINY_SLABS, reports)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_low_latency_bout_is_measured(pool: Pool, num_ranks: int, form: str) -> None:
    case = replace(TINY_SLABS, num_ranks=num_ranks, form=form)
    result = summarise(case, pool.run(run_contenders, case, num_ranks=num_ranks))
    assert {name: len(each.parts_ms) for name, each in result.figures.items()} == {
        "crossdock": 2,
        "crossdock, hooks": 4,
        "gloo": 2,
        "gloo tuned": 2,
    }
    assert all(min(each.parts_ms) > 0 for each in result.figures.values())
    # Four landing zones, with a region for each rank that holds its tokens' bf16 rows.
    needed = 4 * num_ranks * case.num_tokens * 2 * case.hidden
    assert needed <= result.memory["landing"] <= result.memory["begun_with"]
    assert result.memory["slots"] == slot_buffer_bytes(case)


def test_without_memory_of_its_own_a_transport_shows_none(pool: Pool) -> None:
    case = replace(TINY_SLABS, num_ranks=2, transport="collective")
    result = summarise(case, pool.run(run_contenders, case, num_ranks=2))
    assert "landing" not in result.memory
    assert list(memory_table([result]).columns[2].cells) == ["-"]


def slab_round(group: dist.ProcessGroup, case: str, form: str, tuned: bool) -> Any:
    routing = ROUTING_CASES[case].make(group.size())
    num_slots = max(len(idx) for idx in routing.topk_idxs)
    kind = TunedGlooSlabs if tuned else GlooSlabs
    baseline = kind(group, routing.num_experts, num_slots=num_slots, form=form)
    received = baseline.dispatch(*slab_inputs(case, group.size())[group.rank()])
    shape = received.payload.shape
    rows = torch.full(shape, torch.nan, dtype=torch.bfloat16)  # where no row is, none is read
    for expert, count in enumerate(received.recv_count.tolist()):
        rows[expert, :count] = received.payload[expert, :count].to(torch.bfloat16)
    return received._replace(route=None), rows, baseline.combine(rows, received.route)


def slab_inputs(case: str, num_ranks: int) -> list[tuple[torch.Tensor, ...]]:
    inputs = []
    for rank, idx in enumerate(ROUTING_CASES[case].make(num_ranks).topk_idxs):
        generator = torch.Generator().manual_seed(rank)
        x = torch.randn((len(idx), 128), generator=generator, dtype=torch.float32)
        weights = torch.rand(idx.shape, generator=generator, dtype=torch.float32)
        inputs.append((x.to(torch.bfloat16), idx, weights))
    return inputs


@pytest.mark.parametrize("tuned", [False, True], ids=["plain", "tuned"])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", ROUTING_CASES)
def test_the_slab_baseline_equals_the_oracle(pool: Pool, case: str, form: str, tuned: bool) -> None:
    """Also where an expert is named twice, or nobody has a token."""
    xs, idxs, weights = zip(*slab_inputs(case, 4), strict=True)
    num_experts = ROUTING_CASES[case].make(4).num_experts
    slabs = reference_low_latency.dispatch(xs, idxs, num_experts=num_experts, format=form)
    got = pool.run(slab_round, case, form, tuned)
    rows = [
        [each[:count] for each, count in zip(rows, expected.recv_count, strict=True)]
        for (_, rows, _), expected in zip(got, slabs, strict=True)
    ]
    returned = reference_low_latency.combine(rows, idxs, weights, num_experts=num_experts)
    for (received, _, combined), expected, back in zip(got, slabs, returned, strict=True):
        assert received.recv_count.tolist() == expected.recv_count
        for expert, count in enumerate(expected.recv_count):
            payload = received.payload[expert, :count].view(torch.uint8)
            assert torch.equal(payload, expected.rows[expert].view(torch.uint8))
            if expected.scales is not None:
                assert torch.equal(received.scales[expert, :count], expected.scales[expert])
        if combined.numel() and back.combined.any():
            assert reference.calc_diff(combined, back.combined) < TINY_SLABS.combine_bound
        else:
            assert not combined.any()


def test_scales_of_slabs_are_column_major(pool: Pool) -> None:
    for received, _, _ in pool.run(slab_round, "uniform", "fp8", False):
        assert received.scales.stride(1) == 1


def test_memory_is_what_the_schemes_say() -> None:
    # Two ranks, four experts, three tokens a rank; an fp8 row is 512 bytes and four scales.
    case = LowLatency(num_tokens=3, hidden=512, num_experts=4, num_ranks=2, num_topk=1)
    # Two experts here with six slots each, and four experts for each of three tokens: twelve
    # slots either way, of 1024 bytes each on the way back; twice.
    assert slot_buffer_bytes(case) == 2 * 12 * 1024
    assert result_bytes(case, compact=False) == 2 * 6 * 528
    assert result_bytes(case, compact=True) == 6 * 528
    assert case.round_trip_bytes == 528 + 1024


def report(*samples: tuple[float, ...]) -> RankReport:
    others = {"other": [(0.002, 0.004)] * 3, "hooked": [(0.001, 0.002, 0.003, 0.004)] * 3}
    return RankReport(10, 8, {"crossdock": list(samples), **others}, {}, {}, {})


def test_figures_are_medians_of_the_slowest_rank() -> None:
    case = replace(TINY, num_ranks=2, hidden=500, num_iters=3)
    result = summarise(
        case,
        [
            report((0.001, 0.001), (0.002, 0.001), (0.009, 0.001)),
            report((0.001, 0.002), (0.001, 0.001), (0.001, 0.001)),
        ],
    )
    ours = result.figures["crossdock"]
    # Slowest dispatches 1, 2, 9 ms; slowest combines 2, 1, 1 ms; slowest rounds 3, 3, 10 ms.
    assert (ours.dispatch_ms, ours.combine_ms) == pytest.approx((2.0, 1.0))
    assert ours.total_ms == pytest.approx(3.0)
    assert ours.total_quartiles_ms == pytest.approx((3.0, 6.5))
    assert ours.parts_ms == pytest.approx((2.0, 1.0))
    assert result.ratios == pytest.approx({"crossdock": 1.0, "other": 2.0, "hooked": 10 / 3})
    # Ten rows of 1000 bytes there and back in 3 ms; eight of them from the other rank.
    assert ours.logical_gb_s == pytest.approx(20_000 / 3e-3 / 1e9)
    assert ours.wire_gb_s == pytest.approx(16_000 / 3e-3 / 1e9)


def test_halves_are_kept_apart() -> None:
    slow = report((0.001, 0.001))
    slow.samples["hooked"] = [(0.002, 0.001, 0.001, 0.001)] * 3
    result = summarise(replace(TINY, num_ranks=2), [report((0.001, 0.001)), slow])
    hooked = result.figures["hooked"]
    assert hooked.parts_ms == pytest.approx((2.0, 2.0, 3.0, 4.0))
    # The slowest rank's sum of two halves, not the sum of the slowest halves.
    assert (hooked.dispatch_ms, hooked.combine_ms) == pytest.approx((3.0, 7.0))
    assert hooked.total_ms == pytest.approx(10.0)


def a_result() -> Result:
    return summarise(replace(TINY, num_ranks=1), [report((0.001, 0.001))])


def test_json_holds_every_figure() -> None:
    document = json.loads(as_json([a_result()], {"cpu": "abacus"}))
    assert document["machine"] == {"cpu": "abacus"}
    (shown,) = document["results"]
    assert shown["case"]["num_tokens"] == 5
    assert shown["figures"]["other"]["total_ms"] == pytest.approx(6.0)
    assert shown["ratios"]["other"] == pytest.approx(3.0)


def test_the_json_says_what_was_measured() -> None:
    low_latency = summarise(replace(TINY_SLABS, num_ranks=1), [report((0.001, 0.001))])
    document = json.loads(as_json([a_result(), low_latency], {}))
    shown = [(each["kind"], each["combine_bound"]) for each in document["results"]]
    assert shown == [("Throughput", 5e-6), ("LowLatency", 1e-5)]
    assert document["results"][1]["memory"]["slots"] == slot_buffer_bytes(low_latency.case)


def test_tables_have_a_row_for_each_contender() -> None:
    times = times_table([a_result()])
    assert list(times.columns[1].cells) == ["crossdock", "other"]
    halves = halves_table([a_result()])
    assert [list(column.cells) for column in halves.columns[1:]] == [
        ["hooked"], ["1.00"], ["2.00"], ["3.00"], ["4.00"],
    ]  # fmt: skip


def test_memory_is_shown_for_low_latency_only() -> None:
    assert [table.row_count for table in tables_of([a_result()])] == [2, 1]
    case = LowLatency(num_ranks=1)
    reports = [report((0.001, 0.001))._replace(memory={"crossdock": {"landing": 1_234_567}})]
    memory = memory_table([summarise(case, reports)])
    shown = [next(iter(column.cells)) for column in memory.columns]
    # What the buffer told, and what it did not; 2 x 256 x 128 slots of 14336 bytes; 256 x 128 and
    # 8 x 128 rows of 7168 + 4 x 56.
    assert shown == ["128 fp8", "crossdock", "1.2", "-", "939.5", "242.2", "7.6"]


def run_command(*arguments: str) -> Outcome:
    app = typer.Typer()
    app.command()(bench)
    return CliRunner().invoke(app, arguments)


SIZES = ("--ranks=2", "--tokens=3", "--hidden=128", "--experts=4", "--top-k=2", "--iters=1")


def test_the_command_shows_tables_and_writes_json(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    outcome = run_command(*SIZES, "--format=fp8", f"--json={path}")
    assert outcome.exit_code == 0, outcome.output
    document = json.loads(path.read_text(encoding="utf-8"))
    kinds = [(each["kind"], each["case"]["num_tokens"]) for each in document["results"]]
    assert kinds == [("Throughput", 3), ("LowLatency", 3)]
    for result in document["results"]:
        for name, ratio in result["ratios"].items():
            assert name.partition(",")[0] in outcome.output
            if "hooks" not in name:
                assert f"{ratio:.2f} x" in outcome.output
    assert "memory of a rank" in outcome.output


def test_the_command_measures_what_it_is_asked_for() -> None:
    outcome = run_command(*SIZES, "--mode=low-latency", "--format=bf16")
    assert outcome.exit_code == 0, outcome.output
    assert "low-latency dispatch + combine, 2 ranks, hidden 128, top-2 of 4" in outcome.output
    assert "3 bf16" in outcome.output
    assert "3 fp8" not in outcome.output


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--experts=6"], "6 experts: must be a multiple of the 4 ranks"),
        (["--mode=fast"], "mode is 'fast', must be one of both, high-throughput, low-latency"),
        (["--mode=low-latency", "--format=fp4"], "format is 'fp4', must be one of fp8, bf16, int8"),
    ],
)
def test_the_command_refuses_with_a_reason(arguments: list[str], reason: str) -> None:
    outcome = run_command(*arguments)
    assert outcome.exit_code == 1
    assert f"refused: {reason}" in " ".join(outcome.output.split())


@pytest.mark.parametrize(
    "wrong",
    [{"num_experts": 6}, {"num_topk": 9}, {"dtype": "fp64"}, {"num_tokens": 0}, {"num_iters": 0}],
)
def test_impossible_cases_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(TINY, **wrong)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [({"form": "fp4"}, ConfigError), ({"hidden": 130}, ConfigError), ({"hidden": 192}, ShapeError)],
)
def test_impossible_slabs_are_refused(wrong: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        replace(TINY_SLABS, **wrong)
