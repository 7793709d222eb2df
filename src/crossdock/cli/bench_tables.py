"""How the results of a benchmark are shown: tables of times, of halves, of memory.

What the figures mean is said with them; how they come about is the matter of `bench.py` and of
`benchmarks/README.md`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table

from crossdock.cli.bench_low_latency import LowLatency
from crossdock.cli.bench_throughput import Throughput
from crossdock.cli.bench_world import Case

__all__ = ["Figures", "Result", "tables_of"]


@dataclass(frozen=True)
class Figures:
    """One contender in one case.

    Times are medians over rounds of the slowest rank's time; the total's is taken over whole
    rounds. Bandwidth is per rank, both directions together: rows that land in dispatch and are sent
    back in combine, by the total time; logical counts all of them, wire only other ranks' rows.

    `parts_ms` are dispatch and combine; of a contender with hooks the halves of dispatch, then of
    combine: sending, receiving. What a rank waits between the halves is in no figure.
    """

    dispatch_ms: float
    combine_ms: float
    total_ms: float
    total_quartiles_ms: tuple[float, float]
    parts_ms: tuple[float, ...]
    logical_gb_s: float
    wire_gb_s: float

    @property
    def has_halves(self) -> bool:
        """Whether sending and receiving were timed by themselves."""
        return len(self.parts_ms) > 2


@dataclass(frozen=True)
class Result:
    """One measured case.

    Attributes:
        case: What was measured.
        figures: Contender -> its figures.
        ratios: Contender -> its total time by crossdock's.
        about: Contender -> what it says of itself, on rank 0, after the last round.
        memory: Purpose -> bytes on rank 0: what crossdock held after the last round, and the sizes
            that the case has to show beside it.
    """

    case: Case
    figures: dict[str, Figures]
    ratios: dict[str, float]
    about: dict[str, str]
    memory: dict[str, int]


def tables_of(results: Sequence[Result]) -> Iterator[Table]:
    """All tables of cases of one kind, at least one; those without rows are left out."""
    tables = (times_table(results), halves_table(results), memory_table(results))
    return (table for table in tables if table.row_count)


def times_table(results: Sequence[Result]) -> Table:
    """One row a case and contender."""
    table = _table(
        f"{_title(results[0].case)}\nmedian of {results[0].case.num_iters} rounds, slowest rank, "
        "in ms",
        ("dispatch", "combine", "total", "time", "logical", "wire"),
        caption="GB/s per rank; logical: all rows that land, wire: those of other ranks",
    )
    for result in results:
        for name, figures in result.figures.items():
            if not figures.has_halves:
                table.add_row(*_time_cells(result, name))
        table.add_section()
    return table


def halves_table(results: Sequence[Result]) -> Table:
    """One row for each contender with hooks."""
    table = _table(
        "the same with hooks, each half by itself\nslowest rank, in ms",
        ("dispatch sends", "receives", "combine sends", "receives"),
        caption="all ranks have sent before the hook runs: it does not wait",
    )
    for result in results:
        for name, figures in result.figures.items():
            if figures.has_halves:
                parts = (_milliseconds(part_ms) for part_ms in figures.parts_ms)
                table.add_row(_label(result.case), name.partition(",")[0], *parts)
    return table


def memory_table(results: Sequence[Result]) -> Table:
    """One row for each case of the low-latency calls."""
    table = _table(
        "memory of a rank, in MB",
        ("landing", "+ routing", "by slots", "slabs", "compact"),
        caption="landing: where peers write rows; + routing: all the buffer began with\n"
        "by slots: with a slot for each (expert, source, token), twice\n"
        "slabs, compact: what one dispatch returns, in ordinary memory",
    )
    for result in results:
        if isinstance(result.case, LowLatency):
            purposes = ("landing", "begun_with", "slots", "slabs", "compact")
            sizes = (_megabytes(result.memory.get(purpose)) for purpose in purposes)
            table.add_row(_label(result.case), "crossdock", *sizes)
    return table


def _table(title: str, headings: Sequence[str], *, caption: str) -> Table:
    table = Table(title=title, caption=caption, pad_edge=False)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _title(case: Case) -> str:
    prefix = "low-latency " if isinstance(case, LowLatency) else ""
    width = f"hidden {case.hidden}"
    if isinstance(case, Throughput):
        width += f", {case.dtype}"
    choice = f"top-{case.num_topk} of {case.num_experts}"
    return f"{prefix}dispatch + combine, {case.num_ranks} ranks, {width}, {choice}"


def _label(case: Case) -> str:
    form = f" {case.form}" if isinstance(case, LowLatency) else ""
    return f"{case.num_tokens}{form}"


def _time_cells(result: Result, name: str) -> list[str]:
    each = result.figures[name]
    return [
        _label(result.case),
        name,
        _milliseconds(each.dispatch_ms),
        _milliseconds(each.combine_ms),
        _milliseconds(each.total_ms),
        f"{result.ratios[name]:.2f} x",
        f"{each.logical_gb_s:.2f}",
        f"{each.wire_gb_s:.2f}",
    ]


def _milliseconds(time_ms: float) -> str:
    return f"{time_ms:.2f}" if time_ms < 100 else f"{time_ms:.1f}"


def _megabytes(nbytes: int | None) -> str:
    """A size in millions of bytes; a dash where the transport has no memory of its own."""
    return "-" if nbytes is None else f"{nbytes / 1e6:,.1f}"
