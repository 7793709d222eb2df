"""Launches that profilers see under their names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from crossdock.device.launch import Kernel, starter


def move_rows() -> None:
    """Stands for a kernel."""


class Compiled:
    """Stands for what was compiled: keeps what ranges are open when it is launched."""

    def __init__(self, ranges: list[str]) -> None:
        self._ranges = ranges
        self.launches: list[tuple[int, list[str]]] = []

    def __getitem__(self, grid: tuple[int, int, int]):
        return lambda *arguments: self.launches.append((grid[0], list(self._ranges)))


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []

    @contextmanager
    def opened(name: str) -> Iterator[None]:
        names.append(name)
        yield
        names.pop()

    monkeypatch.setattr(torch.cuda.nvtx, "range", opened)
    return names


@pytest.mark.parametrize(("switch", "marks"), [("1", True), ("0", False)])
@pytest.mark.parametrize("hooked", [True, False])
def test_ranges_have_the_name_of_the_kernel_and_of_its_half(
    monkeypatch: pytest.MonkeyPatch, ranges: list[str], switch: str, marks: bool, hooked: bool
) -> None:
    monkeypatch.setenv("CROSSDOCK_NVTX", switch)
    kernel = Kernel(move_rows, num_warps=4)
    compiled = Compiled(ranges)
    kernel._start = starter(compiled, ())
    kernel.launch_halves((2, 3), (), hooked=hooked)()
    halves = [(2, " send"), (3, " receive")] if hooked else [(5, "")]
    wanted = [(num, [f"crossdock move_rows{half}"] if marks else []) for num, half in halves]
    assert compiled.launches == wanted
    assert ranges == []
