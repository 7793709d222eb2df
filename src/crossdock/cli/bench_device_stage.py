"""Where one rank of the benchmark on GPUs works: its device, its groups, its clock, its time left.

A measurement that fails leaves its reason in its figure, and the next one is taken, on all ranks
together. What is measured is the matter of the files that use this one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from crossdock import Buffer
from crossdock.cli.bench_device_cases import (
    Chapter,
    Figure,
    Kernel,
    Report,
    Samples,
    filled,
    row_bytes,
)
from crossdock.cli.bench_device_clocks import Call, Clock, RefusedError
from crossdock.cli.bench_device_truth import Truth

__all__ = ["Stage"]

_TIMEOUT_S, _FIRST_CALL_TIMEOUT_S = 20.0, 60.0


class Stage(contextlib.AbstractContextManager["Stage"]):
    """One rank during one chapter.

    Args:
        group: All ranks, by gloo.
        chapter: What is measured.
        remaining_s: After so many seconds nothing more is begun.

    Attributes:
        group: All ranks, by what moves tensors of the device.
        meeting: All ranks, by gloo.
        report: What has been measured so far.
    """

    def __init__(self, group: dist.ProcessGroup, chapter: Chapter, *, remaining_s: float) -> None:
        self.chapter, self.setup, self.meeting = chapter, chapter.setup, group
        self.rank = group.rank()
        self.on_gpu = chapter.setup.device == "cuda"
        self.device = torch.device("cpu")
        self.group = group
        if self.on_gpu:
            self.device = torch.device("cuda", self.rank)
            torch.cuda.set_device(self.device)
            self.group = dist.new_group(list(range(group.size())), backend="nccl")
        num_iters = chapter.setup.num_iters
        self.clock = Clock(self.group, group, device=self.device, num_iters=num_iters)
        self.report = Report()
        self._deadline = time.monotonic() + remaining_s

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Gives the group back; a device or a rank that has failed cannot take part in that."""
        if kind is not None:
            return
        self.report.is_healthy = all(self.clock.gathered(self._is_healthy()))
        if self.group is not self.meeting and self.report.is_healthy:
            dist.destroy_process_group(self.group)

    @cached_property
    def truth(self) -> Truth:
        """What this rank dispatches, and what must come of it."""
        return Truth(self.setup, self.chapter.num_tokens, self.rank, self.device)

    def buffer(self, **arguments: Any) -> Buffer:
        """A buffer of all ranks that does not wait long for one that has failed. Collective."""
        return Buffer(
            self.group,
            transport=self.setup.transport,
            timeout_s=_TIMEOUT_S,
            first_call_timeout_s=_FIRST_CALL_TIMEOUT_S,
            **arguments,
        )

    def describe(self, buffer: Buffer, **sizes: int) -> None:
        """Keeps what a buffer says of itself, the memory it holds, and other sizes in bytes."""
        self.report.about[str(self.chapter)] = repr(buffer)
        held = self.report.memory.setdefault(str(self.chapter), {})
        if buffer.memory:
            held["peer-addressable"] = sum(buffer.memory.values())
        held.update(sizes)

    def blank(
        self,
        call: str,
        form: str,
        clock: str,
        *,
        num_sms: int | None = None,
        width: int | None = None,
    ) -> Figure:
        """A figure of this chapter without a time.

        Args:
            call: What is measured.
            form: Of the tokens.
            clock: How the time is taken.
            num_sms: As in `Figure`.
            width: Bytes that a call moves for a row; None for one way in this form.
        """
        traffic = self.truth.traffic
        bytes_of_row = row_bytes(form, self.setup.hidden) if width is None else width
        return Figure(
            system=self.chapter.system,
            mode=self.chapter.mode,
            call=call,
            form=form,
            num_tokens=self.chapter.num_tokens,
            clock=clock,
            num_sms=num_sms,
            logical_bytes=traffic.rows * bytes_of_row,
            wire_bytes=traffic.remote_rows * bytes_of_row,
        )

    def measure(self, blank: Figure, take: Callable[[], Samples]) -> Figure:
        """Fills in a figure, or says in it why not, and keeps it. Collective."""
        return self.measure_all([blank], lambda: [take()])[0]

    def measure_all(self, blanks: list[Figure], take: Callable[[], list[Samples]]) -> list[Figure]:
        """The same for figures that are taken together."""
        try:
            figures = self._taken(blanks, take)
        except RefusedError as error:
            figures = [replace(blank, why=str(error)) for blank in blanks]
        self.report.figures += figures
        return figures

    def explain(self, figure: Figure, call: Call) -> None:
        """Adds which kernels a call runs, if that was asked for and the call works. Collective."""
        if not self.setup.with_kernels or figure.time_us is None:
            return
        try:
            seen = self.clock.agreed(lambda: self.clock.kernels(call))
        except RefusedError as error:
            self.report.about[f"kernels of {figure.call}"] = str(error)
            return
        for name, (runs, time_us) in seen.items():
            self.report.kernels.append(Kernel(figure, name, runs, time_us))

    def _is_healthy(self) -> bool:
        try:
            self.clock.synchronize()
        except RuntimeError:  # what CUDA reports once, it reports for ever
            return False
        return True

    def _taken(self, blanks: list[Figure], take: Callable[[], list[Samples]]) -> list[Figure]:
        if any(self.clock.gathered(time.monotonic() > self._deadline)):
            raise RefusedError("skipped: the budget of time is spent")
        ranks = self.clock.gathered(self.clock.agreed(take))
        return [
            filled(blank, [samples[number] for samples in ranks])
            for number, blank in enumerate(blanks)
        ]
