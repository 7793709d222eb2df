"""The picture of the benchmark on GPUs: latency against tokens, of every system, on two panels.

Drawn with matplotlib's objects alone, so that no window, backend or style of the user is touched.
The figures are those of the tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import StrMethodFormatter

from crossdock.cli.bench_device_cases import HIGH_THROUGHPUT, LOW_LATENCY, Figure, Report, Setup

__all__ = ["curves", "draw"]

_INK, _GREY, _PALE = "#24292f", "#6e7781", "#c9d1d9"
_COLOURS = MappingProxyType(
    {
        "crossdock": "#c2410c",
        "crossdock, views": "#eab308",
        "FlashInfer": "#1d4e89",
        "NCCL": "#4d7c0f",
    }
)
_DASHES = MappingProxyType({"bf16": "-", "fp8": "--"})
_LATENT = ":"

Points = Sequence[tuple[int, float]]


def draw(report: Report, setup: Setup, path: Path) -> None:
    """Write the picture to `path`, as PNG."""
    canvas = Canvas(figsize=(11, 6), dpi=150, facecolor="white", layout="constrained")
    panels = canvas.subplots(1, 2, sharey=True)
    for axes, call in zip(panels, ("dispatch", "combine"), strict=True):
        _draw_panel(axes, report, call)
    panels[0].set_ylabel("us, slowest rank", color=_GREY)
    panels[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    lines = {
        label: line
        for axes in panels
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if lines:
        canvas.legend(
            lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False,
            fontsize=8, labelcolor=_INK,
        )  # fmt: skip
    choice = f"top-{setup.num_topk} of {setup.num_experts}"
    rehearsal = "" if setup.device == "cuda" else ", rehearsed on a CPU"
    words = f"{setup.num_ranks} ranks, hidden {setup.hidden}, {choice}{rehearsal}"
    canvas.suptitle(words, x=0.01, ha="left", color=_INK, fontsize=12)
    canvas.savefig(path, format="png")


def curves(report: Report, call: str) -> dict[tuple[str, str, str], Points]:
    """(system, form, mode) -> (tokens, microseconds), by tokens: single calls and those of graphs.

    Of a system that was measured with several SM counts, the one with most of them counts.
    """
    clocks = {HIGH_THROUGHPUT: "events", LOW_LATENCY: "graph"}
    points: dict[tuple[str, str, str], dict[int, Figure]] = {}
    for figure in report.figures:
        is_wanted = figure.call == call and figure.clock == clocks.get(figure.mode)
        if is_wanted and figure.time_us is not None and figure.system in _COLOURS:
            line = points.setdefault((figure.system, figure.form, figure.mode), {})
            other = line.get(figure.num_tokens)
            if other is None or (figure.num_sms or 0) > (other.num_sms or 0):
                line[figure.num_tokens] = figure
    return {key: _line(line) for key, line in points.items()}


def _line(figures: Mapping[int, Figure]) -> Points:
    return [(tokens, figures[tokens].time_us or 0.0) for tokens in sorted(figures)]


def _draw_panel(axes: Axes, report: Report, call: str) -> None:
    shown = curves(report, call)
    for (system, form, mode), points in sorted(shown.items()):
        is_latent = mode == LOW_LATENCY
        tokens, times = zip(*points, strict=True)
        axes.plot(
            tokens,
            times,
            color=_COLOURS[system],
            linestyle=_LATENT if is_latent else _DASHES[form],
            marker="o" if form == "bf16" else "s",
            markersize=3.5,
            label=f"{system}, {form}{', graph' if is_latent else ''}",
        )
    _draw_copies(axes, report, call)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({tokens for points in shown.values() for tokens, _ in points})
    axes.set_xticks(ticks, [str(tick) for tick in ticks], rotation=45 if len(ticks) > 8 else 0)
    axes.minorticks_off()
    if shown:
        axes.set_ylim(bottom=min(us for points in shown.values() for _, us in points) / 2)
    axes.set_title(call, loc="left", color=_INK)
    axes.set_xlabel("tokens of a rank", color=_GREY)
    axes.grid(color=_PALE, linewidth=0.5)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor=_GREY, which="both")


def _draw_copies(axes: Axes, report: Report, call: str) -> None:
    """What copies of the same bytes would take, for rows of bf16."""
    copies = {
        figure.num_tokens: copies_us
        for figure in report.figures
        if (figure.call, figure.form, figure.mode) == (call, "bf16", HIGH_THROUGHPUT)
        and (copies_us := figure.copies_us(report.link_gb_s)) is not None
    }
    if copies:
        tokens = sorted(copies)
        times = [copies[each] for each in tokens]
        axes.plot(
            tokens, times, color=_GREY, linewidth=1, marker="x", label="copies of the bytes, bf16"
        )
