"""`crossdock bench`: how fast dispatch and combine are, beside a written-out baseline.

Both run in one world of processes and take turns; the figures of one run can be compared with each
other and with nothing else. A result that differs from the oracle is refused, not timed. The method
is in `benchmarks/README.md`, what the ranks do in `bench_world.py`; here are the command and the
statistics. How they are shown is the matter of `bench_tables.py`. On GPUs all of it is done
otherwise: see `bench_device.py`.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from crossdock import ConfigError, CrossdockError, __version__, worlds
from crossdock.cli.bench_device import bench_device, device_setup
from crossdock.cli.bench_device_cases import (
    HIGH_THROUGHPUT,
    LOW_LATENCY,
    MODES,
    left_out,
    plan,
    quartiles,
)
from crossdock.cli.bench_low_latency import FORMATS, LowLatency
from crossdock.cli.bench_tables import Figures, Result, tables_of
from crossdock.cli.bench_throughput import Throughput
from crossdock.cli.bench_world import Case, RankReport, run_contenders

__all__ = ["WrongResultError", "as_json", "bench", "measure", "summarise"]

_WORLD_TIMEOUT_S = 1800.0
_MODES = ("both", *MODES)


class WrongResultError(CrossdockError):
    """An implementation differs from the oracle, so that its time would mean nothing."""


def bench(
    *,
    mode: Annotated[str, typer.Option(help=f"Which calls: {', '.join(_MODES)}.")] = "both",
    device: Annotated[
        str, typer.Option(help="cpu; cuda; rehearsal: what cuda does, on the CPU, to try it out.")
    ] = "cpu",
    ranks: Annotated[
        int | None, typer.Option(help="Processes of the world (default: 4, or the GPUs).")
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens a rank; repeatable (default: 64, 1024, and 128 for low latency; on GPUs "
            "4096, and 1, 16, 64, 128, 512)."
        ),
    ] = None,
    hidden: Annotated[
        int | None,
        typer.Option(help="Width of a token (default: 4096; low latency and GPUs: 7168)."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="High throughput: bf16, fp16 or fp32.")] = "bf16",
    form: Annotated[
        list[str] | None,
        typer.Option(
            "--format", help="Low latency: fp8, bf16 or, on CPUs, int8; repeatable (default: all)."
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(help="Experts a token chooses.")] = 8,
    experts: Annotated[
        int | None,
        typer.Option(help="Experts of the world (default: 64; low latency and GPUs: 256)."),
    ] = None,
    iters: Annotated[int, typer.Option(help="Timed rounds of each implementation.")] = 30,
    transport: Annotated[str | None, typer.Option(help="Default: the best that fits.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write figures.")] = None,
    sms: Annotated[
        list[int] | None,
        typer.Option(help="GPUs: SMs that calls may use; repeatable (default: 24, 128)."),
    ] = None,
    peers: Annotated[
        bool, typer.Option(help="GPUs: also NCCL, and FlashInfer if it is there.")
    ] = True,
    kernels: Annotated[bool, typer.Option(help="GPUs: also say which kernels ran.")] = False,
    budget_s: Annotated[
        float, typer.Option("--budget-s", help="GPUs: seconds after which nothing is begun.")
    ] = 240.0,
    picture: Annotated[
        Path | None, typer.Option(help="GPUs: also draw latency against tokens, as PNG.")
    ] = None,
) -> None:
    """Time dispatch and combine beside other ways to do the same, on this machine."""
    console = Console()
    given: dict[str, Any] = {"num_topk": top_k, "num_iters": iters, "transport": transport}
    sizes = {"hidden": hidden, "num_experts": experts}
    given |= {name: size for name, size in sizes.items() if size is not None}
    try:
        modes = _modes_of(mode)
        if device == "cpu":
            given["num_ranks"] = 4 if ranks is None else ranks
            cases = _cases(modes, tokens, forms=form or FORMATS, dtype=dtype, **given)
            tables = [measure(each, console) for each in cases if each]
            _show(tables, console, json_path)
            if torch.cuda.device_count() > 1:
                console.print("There are GPUs here: --device cuda measures on them.")
            return
        given |= {"budget_s": budget_s, "with_peers": peers, "with_kernels": kernels}
        setup = device_setup(device, ranks, **given)
        chapters = plan(setup, modes=modes, tokens=tokens, forms=form, sms=sms)
        for num_tokens in left_out(modes, tokens):
            console.print(f"low latency: {num_tokens} tokens are too many, left out")
        report = bench_device(
            chapters, console, machine_facts(), json_path=json_path, picture=picture
        )
        wrong = [figure.why for figure in report.figures if figure.is_wrong]
        if wrong:
            raise WrongResultError("; ".join(sorted(set(wrong))))
    except (CrossdockError, worlds.WorldError) as error:
        console.print(f"refused: {error}", highlight=False, markup=False, style="red")
        raise typer.Exit(1) from error


def measure(cases: Sequence[Case], console: Console) -> list[Result]:
    """Runs cases of one table, one after the other, in a fresh world of processes.

    Args:
        cases: At least one; all of the same number of ranks.
        console: Where to say what is being measured.

    Raises:
        WrongResultError: a contender differs from the oracle on some rank.
    """
    results = []
    with worlds.Pool(cases[0].num_ranks) as pool:
        for case in cases:
            with console.status(f"{case.num_tokens} tokens a rank, {case.num_ranks} ranks"):
                reports = pool.run(run_contenders, case, timeout_s=_WORLD_TIMEOUT_S)
            results.append(summarise(case, reports))
    return results


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
    held = reports[0].memory.get("crossdock", {})
    return Result(case, figures, ratios, reports[0].about, {**case.sizes(), **held})


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


def as_json(results: Sequence[Result], facts: dict[str, str]) -> str:
    """Everything that the tables say, and the quartiles, for programs."""
    told = [
        {"kind": type(each.case).__name__, "combine_bound": each.case.combine_bound, **asdict(each)}
        for each in results
    ]
    return json.dumps({"machine": facts, "results": told}, indent=2) + "\n"


def _modes_of(mode: str) -> Sequence[str]:
    if mode not in _MODES:
        raise ConfigError(f"mode is {mode!r}, must be one of {', '.join(_MODES)}")
    return MODES if mode == "both" else (mode,)


def _cases(
    modes: Sequence[str],
    tokens: Sequence[int] | None,
    *,
    forms: Iterable[str],
    dtype: str,
    **given: Any,
) -> tuple[list[Case], list[Case]]:
    """The cases of the two tables, of high throughput and of low latency."""
    throughput: list[Case] = [
        Throughput(num_tokens=num_tokens, dtype=dtype, **given)
        for num_tokens in (tokens or (64, 1024) if HIGH_THROUGHPUT in modes else ())
    ]
    low_latency: list[Case] = [
        LowLatency(num_tokens=num_tokens, form=each, **given)
        for num_tokens in (tokens or (128,) if LOW_LATENCY in modes else ())
        for each in forms
    ]
    return throughput, low_latency


def _show(tables: Sequence[Sequence[Result]], console: Console, json_path: Path | None) -> None:
    facts = machine_facts()
    for results in tables:
        for table in tables_of(results):
            console.print(table)
        for about in dict.fromkeys(results[-1].about.values()):
            console.print(about, highlight=False)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)
    if json_path is not None:
        everything = [result for results in tables for result in results]
        json_path.write_text(as_json(everything, facts), encoding="utf-8")


def _figures(case: Case, reports: Sequence[RankReport], name: str) -> Figures:
    rounds = list(zip(*(report.samples[name] for report in reports), strict=True))
    num_parts = len(rounds[0][0])
    there, back = slice(num_parts // 2), slice(num_parts // 2, None)
    totals = _slowest(rounds, slice(None))
    total_ms = statistics.median(totals)
    moved = case.round_trip_bytes / len(reports) / (1e-3 * total_ms) / 1e9
    return Figures(
        dispatch_ms=statistics.median(_slowest(rounds, there)),
        combine_ms=statistics.median(_slowest(rounds, back)),
        total_ms=total_ms,
        total_quartiles_ms=quartiles(totals),
        parts_ms=tuple(
            statistics.median(_slowest(rounds, slice(part, part + 1))) for part in range(num_parts)
        ),
        logical_gb_s=moved * sum(report.num_rows for report in reports),
        wire_gb_s=moved * sum(report.num_remote_rows for report in reports),
    )


def _slowest(rounds: Sequence[Sequence[tuple[float, ...]]], parts: slice) -> list[float]:
    """Of each round the slowest rank's time for these parts of it, in ms."""
    return [1e3 * max(sum(times[parts]) for times in each) for each in rounds]


def _cpu_model() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
