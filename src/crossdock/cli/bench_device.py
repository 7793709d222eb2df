"""The benchmark on GPUs: a process for each, chapter after chapter, until the time is up.

A chapter is a job of the rank processes; what breaks in one is told in the tables and does not
reach the next, for which the processes are started afresh if need be. What is measured is listed in
`bench_device_cases.py`, and how it is shown in `bench_device_tables.py`.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from crossdock import ConfigError, CrossdockError
from crossdock.cli.bench_device_cases import HIGH_THROUGHPUT, Chapter, Figure, Report, Setup
from crossdock.cli.bench_device_clocks import RefusedError
from crossdock.cli.bench_device_flashinfer import measure_flashinfer
from crossdock.cli.bench_device_low_latency import measure_low_latency
from crossdock.cli.bench_device_oracle import judge_by_oracle
from crossdock.cli.bench_device_peers import measure_exchange, measure_links
from crossdock.cli.bench_device_stage import Stage
from crossdock.cli.bench_device_tables import as_json, tables_of
from crossdock.cli.bench_device_throughput import measure_throughput
from crossdock.worlds import Pool, WorldError

__all__ = ["bench_device", "device_facts", "device_setup", "measure_chapters", "run_chapter"]

_CHAPTER_S = 120.0  # one that takes longer hangs, or compiles
_GRACE_S = 30.0  # for the chapter in which the time runs out
_SKIPPED = "skipped: the budget of time is spent"
_WIDTH = 160  # of tables in a file or a pipe
_OTHERS = MappingProxyType(
    {
        "links": measure_links,
        "oracle": judge_by_oracle,
        "NCCL": measure_exchange,
        "FlashInfer": measure_flashinfer,
    }
)
_DEVICES = ("cuda", "rehearsal")
_PACKAGES = ("triton", "flashinfer-python")


def bench_device(
    chapters: Sequence[Chapter],
    console: Console,
    facts: Mapping[str, str],
    *,
    json_path: Path | None = None,
    picture: Path | None = None,
) -> Report:
    """Measures chapters, shows what came of them, and writes it down.

    Args:
        chapters: At least one; all of the same setup.
        console: Where to show it.
        facts: What figures depend on.
        json_path: Where to write all of it for programs, anew after each chapter; or None.
        picture: Where to draw it, as PNG; or None.
    """
    setup, report = chapters[0].setup, Report()
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH)
    told = {**facts, **device_facts(setup)}

    def keep(chapter: Chapter, took_s: float) -> None:
        console.print(f"{chapter}: {took_s:.1f} s", highlight=False)
        if json_path is not None:
            json_path.write_text(as_json(report, setup, told), encoding="utf-8")

    measure_chapters(chapters, report, keep)
    for table in tables_of(report, setup):
        console.print(table)
    for name, value in {**report.about, "machine": _listed(told)}.items():
        console.print(f"{name}: {value}", highlight=False, markup=False)
    if picture is not None:
        from crossdock.cli.bench_device_picture import draw

        draw(report, setup, picture)
    return report


def measure_chapters(
    chapters: Sequence[Chapter], report: Report, keep: Callable[[Chapter, float], None]
) -> None:
    """Fills a report, chapter by chapter; after each one `keep` hears how long it took."""
    setup = chapters[0].setup
    deadline = time.monotonic() + setup.budget_s
    with Pool(setup.num_ranks) as pool:
        for chapter in chapters:
            began = time.monotonic()
            report.add(_measured(pool, chapter, deadline - began))
            keep(chapter, time.monotonic() - began)


def _measured(pool: Pool, chapter: Chapter, remaining_s: float) -> Report:
    """What a chapter brings, if it is only the reason why it brings nothing."""
    if remaining_s <= 0:
        return Report(figures=[missing(chapter, _SKIPPED)])
    timeout_s = min(_CHAPTER_S, remaining_s + _GRACE_S)
    try:
        report = pool.run(run_chapter, chapter, remaining_s, timeout_s=timeout_s)[0]
    except WorldError as error:
        pool.close()
        return Report(figures=[missing(chapter, _last_line(str(error)))])
    if not report.is_healthy:
        pool.close()
    return report  # type: ignore[no-any-return]


def run_chapter(group: dist.ProcessGroup, chapter: Chapter, remaining_s: float) -> Report:
    """Measures a chapter on this rank.

    **Collective**: every rank of the group. **Sync**: returns when all of it is done.

    Args:
        group: All ranks, by gloo.
        chapter: What to measure.
        remaining_s: After so many seconds nothing more is begun.
    """
    with Stage(group, chapter, remaining_s=remaining_s) as stage:
        try:
            _verb(chapter)(stage)
        except RefusedError as error:
            stage.report.figures.append(missing(chapter, str(error)))
        except CrossdockError as error:  # such as that of a buffer which cannot be made
            why = f"{type(error).__name__}: {error}"
            stage.report.figures.append(missing(chapter, why))
    return stage.report


def _verb(chapter: Chapter) -> Callable[[Stage], None]:
    """What measures a chapter."""
    if chapter.system == "crossdock":
        is_throughput = chapter.mode == HIGH_THROUGHPUT
        return measure_throughput if is_throughput else measure_low_latency
    return _OTHERS[chapter.system]


def missing(chapter: Chapter, why: str) -> Figure:
    """A figure that stands for a chapter that did not begin, or did not come to its end."""
    return Figure(
        system=chapter.system,
        mode=chapter.mode,
        call="what is missing",
        form="",
        num_tokens=chapter.num_tokens,
        clock="",
        why=why,
    )


def device_setup(device: str, ranks: int | None, **given: Any) -> Setup:
    """The setup of a run, with a rank for each GPU unless a number is asked for.

    Args:
        device: "cuda", or "rehearsal" for the same on CPU tensors.
        ranks: How many; or None.
        **given: Of `Setup`.

    Raises:
        ConfigError: there is no such device, there are too few GPUs, or `Setup` refuses.
    """
    if device not in _DEVICES:
        raise ConfigError(f"device is {device!r}, must be one of cpu, {', '.join(_DEVICES)}")
    if device == "rehearsal":
        return Setup(device="cpu", num_ranks=4 if ranks is None else ranks, **given)
    present = torch.cuda.device_count()
    wanted = max(present, 1) if ranks is None else ranks
    if wanted > present:
        raise ConfigError(f"{wanted} GPUs are needed, this machine has {present}")
    return Setup(device="cuda", num_ranks=wanted, **given)


def device_facts(setup: Setup) -> dict[str, str]:
    """What figures depend on, beside the host."""
    facts = {name: _version(name) for name in _PACKAGES}
    if setup.device == "cuda":
        facts["gpu"] = f"{setup.num_ranks} x {torch.cuda.get_device_name(0)}"
        facts["cuda"] = str(torch.version.cuda)
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return facts


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _listed(facts: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _last_line(text: str) -> str:
    """Of a traceback the line that says what happened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
