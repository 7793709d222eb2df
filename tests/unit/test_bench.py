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

from crossdock import ConfigError, reference
from crossdock.cases import ROUTING_CASES
from crossdock.cli.bench import Result, WrongResultError, as_json, as_table, bench, summarise
from crossdock.cli.bench_baseline import GlooBaseline, Received
from crossdock.cli.bench_world import (
    CONTENDERS,
    DTYPES,
    Case,
    Contenders,
    RankReport,
    ask_oracle,
    make_inputs,
    run_contenders,
)
from crossdock.worlds import Pool

TINY = Case(num_tokens=5, hidden=16, num_topk=3, num_experts=8, num_iters=2)


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
    expected = [len(each.received.x) for each in ask_oracle(case)]
    assert [report.num_rows for report in reports] == expected


def baseline_round(group: dist.ProcessGroup, case: str) -> tuple[Received, torch.Tensor]:
    routing = ROUTING_CASES[case].make(group.size())
    baseline = GlooBaseline(group, routing.num_experts)
    received = baseline.dispatch(*routed_inputs(case, group.size())[group.rank()])
    return received._replace(route=None), baseline.combine(received.x, received.route)


def routed_inputs(case: str, num_ranks: int) -> list[tuple[torch.Tensor, ...]]:
    inputs = []
    for rank, idx in enumerate(ROUTING_CASES[case].make(num_ranks).topk_idxs):
        drawn = make_inputs(replace(TINY, num_tokens=max(len(idx), 1)), rank)
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


def report(*samples: tuple[float, float]) -> RankReport:
    return RankReport(10, 8, {"crossdock": list(samples), "other": [(0.002, 0.004)] * 3}, {}, {})


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
    assert result.ratios == pytest.approx({"crossdock": 1.0, "other": 2.0})
    # Ten rows of 1000 bytes there and back in 3 ms; eight of them from the other rank.
    assert ours.logical_gb_s == pytest.approx(20_000 / 3e-3 / 1e9)
    assert ours.wire_gb_s == pytest.approx(16_000 / 3e-3 / 1e9)


def a_result() -> Result:
    return summarise(replace(TINY, num_ranks=1), [report((0.001, 0.001))])


def test_json_holds_every_figure() -> None:
    document = json.loads(as_json([a_result()], {"cpu": "abacus"}))
    assert document["machine"] == {"cpu": "abacus"}
    (shown,) = document["results"]
    assert shown["case"]["num_tokens"] == 5
    assert shown["figures"]["other"]["total_ms"] == pytest.approx(6.0)
    assert shown["ratios"]["other"] == pytest.approx(3.0)


def test_table_has_a_row_for_each_contender() -> None:
    table = as_table([a_result()])
    assert table.row_count == 2
    assert list(table.columns[1].cells) == ["crossdock", "other"]


def run_command(*arguments: str) -> Outcome:
    app = typer.Typer()
    app.command()(bench)
    return CliRunner().invoke(app, arguments)


def test_the_command_shows_a_table_and_writes_json(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    sizes = ("--ranks=2", "--tokens=3", "--hidden=16", "--experts=4", "--top-k=2", "--iters=1")
    outcome = run_command(*sizes, f"--json={path}")
    assert outcome.exit_code == 0, outcome.output
    document = json.loads(path.read_text(encoding="utf-8"))
    assert [shown["case"]["num_tokens"] for shown in document["results"]] == [3]
    for name, ratio in document["results"][0]["ratios"].items():
        assert name in outcome.output
        assert f"{ratio:.2f} x" in outcome.output


def test_the_command_refuses_with_a_reason() -> None:
    outcome = run_command("--experts=6")
    assert outcome.exit_code == 1
    assert "refused: 6 experts: must be a multiple of the 4 ranks" in outcome.output


@pytest.mark.parametrize(
    "wrong",
    [{"num_experts": 6}, {"num_topk": 9}, {"dtype": "fp64"}, {"num_tokens": 0}, {"num_iters": 0}],
)
def test_impossible_cases_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(TINY, **wrong)
