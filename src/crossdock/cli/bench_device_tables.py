"""How the results of the benchmark on GPUs are shown: tables, and JSON for programs.

What the columns mean is said under them; how the figures come about is said in
`bench_device_cases.py` and `bench_device_clocks.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from crossdock.cli.bench_device_cases import (
    HIGH_THROUGHPUT,
    HOOKED,
    KNOWN,
    LOW_LATENCY,
    PAIR,
    Figure,
    Report,
    Setup,
)

__all__ = ["as_json", "tables_of"]

_WIDEST = 160  # characters of a reason in a table; JSON has all of them
_MOST_LABELS = 6  # of figures that are missing for the same reason
_CALLS = (
    "layout",
    "dispatch",
    "dispatch, cached",
    "dispatch, fixed rows",
    "dispatch, views",
    "combine",
)
_COLUMNS = (
    (PAIR, "graph", "both"),
    (KNOWN, "graph", "weights first"),
    (HOOKED, "graph", "hooks"),
    ("dispatch", "graph", "dispatch"),
    ("combine", "graph", "combine"),
    (PAIR, "wall", "wall"),
    (HOOKED, "wall", "wall, hooks"),
)
"""Of low latency: the call, its clock, and the heading of its column."""


def tables_of(report: Report, setup: Setup) -> Iterator[Table]:
    """All tables; those without rows are left out."""
    tables = (
        throughput_table(report, setup),
        low_latency_table(report, setup),
        memory_table(report),
        kernel_table(report),
        missing_table(report),
    )
    return (table for table in tables if table.row_count)


def as_json(report: Report, setup: Setup, facts: Mapping[str, str]) -> str:
    """Everything that was measured, and why the rest was not, for programs."""
    return json.dumps(
        {
            "machine": dict(facts),
            "setup": asdict(setup),
            "copies_gb_s": report.link_gb_s,
            "figures": [_as_dict(figure, report.link_gb_s) for figure in report.figures],
            "kernels": [
                {"name": each.name, "runs": each.runs, "time_us": each.time_us}
                | _as_dict_of_call(each.figure)
                for each in report.kernels
            ],
            "memory": report.memory,
            "about": report.about,
        },
        indent=2,
    )


def throughput_table(report: Report, setup: Setup) -> Table:
    """One row for each call that was measured with a cold cache."""
    table = _table(
        f"high throughput: {_sizes(setup)}\n"
        f"median of {setup.num_iters} calls, slowest rank, from call to usable result, cold cache",
        ("tokens", "call", "", "system", "SMs"),
        ("us", "host us", "logical", "wire", "copies us"),
        caption="GB/s of a rank; logical: all rows that land, wire: those of other ranks\n"
        f"{_copies_words(report)}\nhost: until the call returned",
    )
    figures = [each for each in _measured(report, HIGH_THROUGHPUT) if each.clock == "events"]
    tokens = None
    for figure in sorted(figures, key=_throughput_order):
        if tokens not in (None, figure.num_tokens):
            table.add_section()
        tokens = figure.num_tokens
        table.add_row(*_throughput_cells(figure, report.link_gb_s))
    return table


def low_latency_table(report: Report, setup: Setup) -> Table:
    """One row for each system, token count and format."""
    table = _table(
        f"low latency: {_sizes(setup)}\nus, slowest rank; dispatch and combine by a CUDA graph of "
        "10, median of 15 replays; wall: called from the host",
        ("tokens", "", "system"),
        (*(heading for _, _, heading in _COLUMNS), "host", "copies", "logical", "wire"),
        caption="weights first: dispatch is given them already; host: until both calls returned\n"
        "copies, and GB/s as above: of both, by rows, of which a token sends one to each rank\n"
        f"{_copies_words(report)}",
    )
    rows: dict[tuple[int, str, str], dict[tuple[str, str], Figure]] = {}
    for figure in _measured(report, LOW_LATENCY):
        key = (figure.num_tokens, figure.form, figure.system)
        rows.setdefault(key, {})[figure.call, figure.clock] = figure
    for key in sorted(rows):
        table.add_row(*map(str, key), *_low_latency_cells(rows[key], report.link_gb_s))
    return table


def memory_table(report: Report) -> Table:
    """One row for each purpose of memory."""
    table = _table(
        "memory of a rank",
        ("", "purpose"),
        ("MB",),
        caption="peer-addressable: what other ranks can reach; slabs: what one dispatch returns",
    )
    for chapter, sizes in report.memory.items():
        for purpose, nbytes in sizes.items():
            table.add_row(chapter, purpose, f"{nbytes / 1e6:,.1f}")
    return table


def kernel_table(report: Report) -> Table:
    """One row for each kernel of each call."""
    table = _table("kernels on rank 0", ("", "kernel"), ("runs", "us"), caption="of one call")
    for each in report.kernels:
        row = (_label(each.figure), each.name[:_WIDEST], _number(each.runs), _number(each.time_us))
        table.add_row(*row)
    return table


def missing_table(report: Report) -> Table:
    """One row for each figure that is missing, with the reason."""
    table = _table("not measured", ("", "why"), (), caption="")
    reasons: dict[str, list[str]] = {}
    for figure in report.figures:
        if figure.why:
            reasons.setdefault(_first_line(figure.why), []).append(_label(figure))
    for why, labels in reasons.items():
        more = len(labels) - _MOST_LABELS
        rest = [f"and {more} more"] if more > 0 else []
        table.add_row("\n".join(labels[:_MOST_LABELS] + rest), why)
    return table


def _table(title: str, names: Sequence[str], numbers: Sequence[str], *, caption: str) -> Table:
    table = Table(title=title, caption=caption or None, pad_edge=False)
    for name in names:
        table.add_column(name)
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table


def _sizes(setup: Setup) -> str:
    choice = f"top-{setup.num_topk} of {setup.num_experts}"
    rehearsal = "" if setup.device == "cuda" else ", REHEARSED ON A CPU"
    return f"{setup.num_ranks} ranks, hidden {setup.hidden}, {choice}{rehearsal}"


def _copies_words(report: Report) -> str:
    if report.link_gb_s is None:
        return "copies: were not measured"
    return (
        f"copies: the wire's bytes at {report.link_gb_s:.0f} GB/s, which copies to all other ranks "
        "at once got in this run; no limit"
    )


def _measured(report: Report, mode: str) -> Iterable[Figure]:
    return (each for each in report.figures if each.mode == mode and each.time_us is not None)


def _throughput_order(figure: Figure) -> tuple[int, int, str, str, int]:
    place = _CALLS.index(figure.call)
    return figure.num_tokens, place, figure.form, figure.system, figure.num_sms or 0


def _throughput_cells(figure: Figure, link_gb_s: float | None) -> list[str]:
    return [
        str(figure.num_tokens),
        figure.call,
        figure.form,
        figure.system,
        _number(figure.num_sms, 0),
        _number(figure.time_us),
        _number(figure.host_us),
        _number(figure.logical_gb_s),
        _number(figure.wire_gb_s),
        _number(figure.copies_us(link_gb_s)),
    ]


def _low_latency_cells(
    figures: Mapping[tuple[str, str], Figure], link_gb_s: float | None
) -> list[str]:
    times = [figures.get((call, clock)) for call, clock, _ in _COLUMNS]
    both, wall = figures.get((PAIR, "graph")), figures.get((PAIR, "wall"))
    known = both or wall
    return [
        *(_number(each.time_us if each else None) for each in times),
        _number(wall.host_us if wall else None),
        _number(known.copies_us(link_gb_s) if known else None),
        _number(both.logical_gb_s if both else None),
        _number(both.wire_gb_s if both else None),
    ]


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _label(figure: Figure) -> str:
    tokens = f"{figure.num_tokens} tokens" if figure.num_tokens else ""
    sms = f"{figure.num_sms} SMs" if figure.num_sms else ""
    parts = (figure.system, figure.mode, tokens, figure.call, figure.form, sms, figure.clock)
    return ", ".join(part for part in parts if part)


def _first_line(why: str) -> str:
    lines = why.splitlines() or [""]
    return lines[0] if len(lines[0]) <= _WIDEST else f"{lines[0][:_WIDEST]}..."


def _as_dict_of_call(figure: Figure) -> dict[str, Any]:
    names = ("system", "mode", "call", "form", "num_tokens", "num_sms", "clock")
    return {name: getattr(figure, name) for name in names}


def _as_dict(figure: Figure, link_gb_s: float | None) -> dict[str, Any]:
    return {
        **asdict(figure),
        "logical_gb_s": figure.logical_gb_s,
        "wire_gb_s": figure.wire_gb_s,
        "copies_us": figure.copies_us(link_gb_s),
    }
