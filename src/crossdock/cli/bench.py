"""`crossdock bench`: how fast dispatch and combine are, beside a written-out baseline.

Both run in one world of processes and take turns; the figures of one run can be compared with each
other and with nothing else. A result that differs from the oracle is refused, not timed. The method
is in `benchmarks/README.md`, what the ranks do in `bench_world.py`; here are the command, the
statistics and how they are shown.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from crossdock import CrossdockError, __version__, worlds
from crossdock.cli.bench_world import COMBINE_BOUND, Case, RankReport, run_contenders

__all__ = ["Figures", "Result", "WrongResultError", "bench", "measure", "summarise"]

_WORLD_TIMEOUT_S = 1800.0


class WrongResultError(CrossdockError):
    """An implementation differs from the oracle, so that its time would mean nothing."""


@dataclass(frozen=True)
class Figures:
    """One contender in one case.

    Times are medians over rounds of the slowest rank's time; the total's is taken over whole
    rounds. Bandwidth is per rank, both directions together: rows received in dispatch and sent
    back in combine, by the total time; logical counts all of them, wire only other ranks' rows.
    """

    dispatch_ms: float
    combine_ms: float
    total_ms: float
    total_quartiles_ms: tuple[float, float]
    logical_gb_s: float
    wire_gb_s: float


@dataclass(frozen=True)
class Result:
    """One measured case.

    Attributes:
        case: What was measured.
        figures: Contender -> its figures.
        ratios: Contender -> its total time by crossdock's.
        about: Contender -> what it says of itself, on rank 0, after the last round.
    """

    case: Case
    figures: dict[str, Figures]
    ratios: dict[str, float]
    about: dict[str, str]


def bench(
    *,
    ranks: Annotated[int, typer.Option(help="Processes of the world.")] = 4,
    tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens a rank; repeatable. [default: 64, 1024]")
    ] = None,
    hidden: Annotated[int, typer.Option(help="Width of a token.")] = 4096,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    top_k: Annotated[int, typer.Option(help="Experts a token chooses.")] = 8,
    experts: Annotated[int, typer.Option(help="Experts of the world.")] = 64,
    iters: Annotated[int, typer.Option(help="Timed rounds of each implementation.")] = 30,
    transport: Annotated[str | None, typer.Option(help="Default: the best that fits.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write figures.")] = None,
) -> None:
    """Time dispatch and combine beside a gloo all-to-all baseline, on this machine."""
    console = Console()
    try:
        cases = [
            Case(
                num_tokens=num_tokens,
                num_ranks=ranks,
                hidden=hidden,
                dtype=dtype,
                num_topk=top_k,
                num_experts=experts,
                num_iters=iters,
                transport=transport,
            )
            for num_tokens in tokens or (64, 1024)
        ]
        results = [_measure_aloud(case, console) for case in cases]
    except (CrossdockError, worlds.WorldError) as error:
        console.print(f"refused: {error}", highlight=False, markup=False, style="red")
        raise typer.Exit(1) from error
    facts = machine_facts()
    console.print(as_table(results))
    for about in results[-1].about.values():
        console.print(about, highlight=False)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)
    if json_path is not None:
        json_path.write_text(as_json(results, facts), encoding="utf-8")


def measure(case: Case) -> Result:
    """Runs one case in a fresh world of processes.

    Raises:
        WrongResultError: a contender differs from the oracle on some rank.
    """
    with worlds.Pool(case.num_ranks) as pool:
        return summarise(case, pool.run(run_contenders, case, timeout_s=_WORLD_TIMEOUT_S))


def summarise(case: Case, reports: Sequence[RankReport]) -> Result:
    """Makes figures of what the ranks report.

    Raises:
        WrongResultError: a rank reports a refusal.
    """
    refusals = [
        f"{name} on rank {rank}: {why}"
        for rank, report in enumerate(reports)
        for name, why in report.refusals.items()
    ]
    if refusals:
        raise WrongResultError("; ".join(refusals))
    figures = {name: _figures(case, reports, name) for name in reports[0].samples}
    ours = figures["crossdock"].total_ms
    ratios = {name: each.total_ms / ours for name, each in figures.items()}
    return Result(case, figures, ratios, reports[0].about)


def machine_facts() -> dict[str, str]:
    """What figures depend on, and when they were taken."""
    return {
        "cpu": _cpu_model(),
        "cores": str(os.cpu_count()),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "crossdock": __version__,
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
    }


def as_table(results: Sequence[Result]) -> Table:
    """One row a case and contender."""
    case = results[0].case
    table = Table(
        title=f"dispatch + combine, {case.num_ranks} ranks, hidden {case.hidden}, {case.dtype}, "
        f"top-{case.num_topk} of {case.num_experts}\nmedian of {case.num_iters} rounds, slowest "
        "rank, in ms",
        caption="GB/s per rank; logical: all rows received, wire: those of other ranks",
    )
    table.add_column("tokens", justify="right")
    table.add_column("", no_wrap=True)
    for heading in ("dispatch", "combine", "total", "time", "logical", "wire"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        for name in result.figures:
            table.add_row(*_cells(result, name))
        table.add_section()
    return table


def as_json(results: Sequence[Result], facts: dict[str, str]) -> str:
    """Everything that the table says, and the quartiles, for programs."""
    document = {
        "machine": facts,
        "combine_bound": COMBINE_BOUND,
        "results": [asdict(result) for result in results],
    }
    return json.dumps(document, indent=2) + "\n"


def _measure_aloud(case: Case, console: Console) -> Result:
    with console.status(f"{case.num_tokens} tokens a rank, {case.num_ranks} ranks"):
        return measure(case)


def _figures(case: Case, reports: Sequence[RankReport], name: str) -> Figures:
    rounds = list(zip(*(report.samples[name] for report in reports), strict=True))
    totals = [1e3 * max(dispatch + combine for dispatch, combine in each) for each in rounds]
    total_ms = statistics.median(totals)
    moved = 2 * case.row_bytes / len(reports) / (1e-3 * total_ms) / 1e9
    return Figures(
        dispatch_ms=statistics.median(1e3 * max(d for d, _ in each) for each in rounds),
        combine_ms=statistics.median(1e3 * max(c for _, c in each) for each in rounds),
        total_ms=total_ms,
        total_quartiles_ms=_quartiles(totals),
        logical_gb_s=moved * sum(report.num_rows for report in reports),
        wire_gb_s=moved * sum(report.num_remote_rows for report in reports),
    )


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def _cells(result: Result, name: str) -> list[str]:
    each = result.figures[name]
    return [
        str(result.case.num_tokens),
        name,
        f"{each.dispatch_ms:.2f}",
        f"{each.combine_ms:.2f}",
        f"{each.total_ms:.2f}",
        f"{result.ratios[name]:.2f} x",
        f"{each.logical_gb_s:.2f}",
        f"{each.wire_gb_s:.2f}",
    ]


def _cpu_model() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
