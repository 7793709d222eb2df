"""The picture that `crossdock demo` leaves: how the loss fell, and which experts did the work.

Drawn with matplotlib's objects alone, so that no window, backend or style of the user is touched.
The figures come from `demo_training.py`, step by step; none is made up here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from crossdock.cli.demo_training import Step

__all__ = ["Story", "draw"]

_INK, _GREY, _PALE, _WARM, _COLD = "#24292f", "#6e7781", "#c9d1d9", "#c2410c", "#1d4e89"
_MAX_COLUMNS = 160


class Story(NamedTuple):
    """What the picture tells. Losses in nats per byte."""

    steps: Sequence[Step]
    num_ranks: int
    top_k: int
    text: bytes
    held_out_loss: float


def draw(story: Story, path: Path) -> None:
    """Write the picture to `path`, as PNG."""
    figure = Figure(figsize=(10, 7.5), dpi=150, facecolor="white", layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(1, 1.15))
    _draw_loss(above, story)
    image = _draw_experts(below, story)
    bar = figure.colorbar(image, ax=below, pad=0.015, ticks=[0, 0.5, 1, 1.5, 2])
    bar.ax.set_yticklabels(["none", "half", "even share", "1.5 times", "twice or more"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=_GREY)
    figure.savefig(path, format="png")


def _draw_loss(axes: Axes, story: Story) -> None:
    losses = torch.tensor([step.loss for step in story.steps], dtype=torch.float64, device="cpu")
    numbers = range(1, len(losses) + 1)
    axes.plot(numbers, losses, color=_PALE, linewidth=1)
    axes.plot(numbers, _smoothed(losses), color=_WARM, linewidth=2.2)
    axes.plot(len(losses), story.held_out_loss, "o", color=_COLD, markersize=7, clip_on=False)
    axes.annotate(
        f"text never seen: {story.held_out_loss:.2f}",
        (len(losses), story.held_out_loss),
        xytext=(-10, 16),
        textcoords="offset points",
        ha="right",
        color=_COLD,
    )
    known = _entropy(story.text)
    axes.axhline(known, color=_GREY, linewidth=1, linestyle=(0, (4, 4)))
    axes.text(
        len(losses), known, "knowing only how frequent each byte is ", color=_GREY,
        fontsize=8, ha="right", va="bottom",
    )  # fmt: skip
    axes.set_title(_headline(story), loc="left", color=_INK, fontsize=12, pad=12)
    axes.set_ylabel("loss, nats per byte", color=_GREY)
    axes.set_xlim(1, len(losses))
    _tidy(axes)


def _draw_experts(axes: Axes, story: Story) -> AxesImage:
    load = _load(story.steps)
    num_blocks, num_experts, _ = load.shape
    image = axes.imshow(
        load.flatten(0, 1).numpy(),
        aspect="auto",
        interpolation="nearest",
        extent=(1, len(story.steps), num_blocks * num_experts, 0),
        cmap=LinearSegmentedColormap.from_list("load", [_COLD, "#f6f3ec", _WARM]),
        norm=TwoSlopeNorm(1, vmin=0, vmax=2),
    )
    num_local = num_experts // story.num_ranks
    for row in range(num_local, num_blocks * num_experts, num_local):
        heavy = row % num_experts == 0
        axes.axhline(row, color="white", linewidth=5 if heavy else 1.5)
    owners = [f"rank {rank}" for rank in range(story.num_ranks)] * num_blocks
    axes.set_yticks([(i + 0.5) * num_local for i in range(len(owners))], owners, fontsize=8)
    axes.set_title("tokens per expert", loc="left", color=_INK, fontsize=12, pad=8)
    axes.set_xlabel("step", color=_GREY)
    for block in range(num_blocks):
        axes.text(
            1.004, 1 - (block + 0.5) / num_blocks, f"layer {block}", color=_GREY,
            fontsize=8, rotation=90, va="center", transform=axes.transAxes,
        )  # fmt: skip
    _tidy(axes)
    return image


def _headline(story: Story) -> str:
    num_experts = len(story.steps[0].num_tokens_per_expert[0])
    return (
        f"{num_experts} experts on {story.num_ranks} ranks, {story.top_k} for each token: "
        f"loss {story.steps[0].loss:.2f} to {_smoothed_end(story.steps):.2f}"
    )


def _smoothed_end(steps: Sequence[Step]) -> float:
    last = [step.loss for step in steps[-10:]]
    return sum(last) / len(last)


def _tidy(axes: Axes) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor=_GREY)


def _smoothed(values: Tensor, *, reach: int = 6) -> Tensor:
    """Mean of each value and up to `reach` on either side, fewer towards the ends."""
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
    here = torch.arange(len(values), dtype=torch.int64, device=values.device)
    around = torch.minimum(here, len(values) - 1 - here).clamp(max=reach)
    return (sums[here + around + 1] - sums[here - around]) / (2 * around + 1)


def _load(steps: Sequence[Step]) -> Tensor:
    """[blocks, E, columns]: tokens of each expert beside an even share, steps put together."""
    counts = torch.tensor(
        [step.num_tokens_per_expert for step in steps], dtype=torch.float64, device="cpu"
    )
    columns = counts.tensor_split(min(len(steps), _MAX_COLUMNS))
    sums = torch.stack([column.sum(0) for column in columns], dim=-1)
    return sums / sums.mean(1, keepdim=True)


def _entropy(text: bytes) -> float:
    """Nats per byte that remain when only the frequency of each byte is known."""
    counts = torch.bincount(torch.frombuffer(bytearray(text), dtype=torch.uint8).long())
    share = counts[counts > 0].double() / len(text)
    return -(share * share.log()).sum().item()
