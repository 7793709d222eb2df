"""What stands beside the library in the benchmark on GPUs: the links, and NCCL.

The links are shown by copies between devices when every rank writes to all others at once; kernels
may get more. NCCL moves the same rows as the library, a
token once per rank that wants it, with counts that everybody knows beforehand; alone, and with the
gathering and summing that a program needs around it.

T tokens of a rank, H hidden, N rows received, S rows sent.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock import UnsupportedError
from crossdock.cli.bench_device_cases import FORMS, LOW_LATENCY, PAIR, Figure, Samples, row_bytes
from crossdock.cli.bench_device_clocks import Call, Check
from crossdock.cli.bench_device_stage import Stage
from crossdock.cli.bench_device_throughput import sum_problem
from crossdock.cli.bench_device_truth import encoded, factor

__all__ = ["measure_exchange", "measure_links"]

_COPY_BYTES = 256 << 20


def measure_links(stage: Stage) -> None:
    """Times copies to all other ranks at once. Collective."""
    nbytes = float(_COPY_BYTES * (stage.setup.num_ranks - 1))
    blank = Figure(
        system="links",
        mode="",
        call="copy to all other ranks",
        form="bytes",
        num_tokens=0,
        clock="events",
        logical_bytes=nbytes,
        wire_bytes=nbytes,
    )
    figure = stage.measure(blank, lambda: _copied(stage))
    stage.report.link_gb_s = figure.wire_gb_s


def _copied(stage: Stage) -> Samples:
    copies = stage.clock.agreed(lambda: _Copies(stage))
    return stage.clock.events(copies, lambda _: "")


class _Copies:
    """Copies from this rank's device to every other one, a stream for each."""

    def __init__(self, stage: Stage) -> None:
        num_ranks = stage.setup.num_ranks
        if not stage.on_gpu or num_ranks < 2:
            raise UnsupportedError("copies between devices need two GPUs")
        others = [(stage.rank + step) % num_ranks for step in range(1, num_ranks)]
        self._source = _memory(stage.device)
        self._targets = [_memory(torch.device("cuda", rank)) for rank in others]
        self._streams = [torch.cuda.Stream(stage.device) for _ in others]

    def __call__(self) -> None:
        here = torch.cuda.current_stream()
        for stream, target in zip(self._streams, self._targets, strict=True):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                target.copy_(self._source, non_blocking=True)
        for stream in self._streams:
            here.wait_stream(stream)


def _memory(device: torch.device) -> Tensor:
    return torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)


def measure_exchange(stage: Stage) -> None:
    """Times NCCL's exchange of the rows. Collective.

    fp8 rows are packed beforehand, payload and scales together.
    """
    is_low_latency = stage.chapter.mode == LOW_LATENCY
    for form in stage.chapter.forms if is_low_latency else FORMS:
        _Exchange(stage, form).measure()
    backend = dist.get_backend(stage.group)
    stage.report.about[str(stage.chapter)] = f"all_to_all_single by {backend}, counts known"


class _Exchange:
    """The exchange on one rank: rows there in some form, and back in bf16."""

    def __init__(self, stage: Stage, form: str) -> None:
        self.stage, self.form, self.truth = stage, form, stage.truth
        self.is_low_latency = stage.chapter.mode == LOW_LATENCY
        tokens = [_packed(inputs.x, form) for inputs in self.truth.drawn]
        self.x, self.wanted = tokens[stage.rank], self.truth.landed(tokens)
        self.rows = self.x.index_select(0, self.truth.sent_tokens)
        landed = self.truth.landed([inputs.x for inputs in self.truth.drawn])
        self.outputs = landed * factor(stage.rank, stage.setup.num_ranks)

    def measure(self) -> None:
        """Times dispatch; combine, which is the same for all forms, once; in graphs both, too."""
        there, back = (row_bytes(form, self.stage.setup.hidden) for form in (self.form, "bf16"))
        self.one("dispatch", self.there, self.rows_problem, width=there)
        self.one("dispatch", self.gathered, self.rows_problem, width=there, is_whole=True)
        if self.is_low_latency or self.form == "bf16":
            self.one("combine", self.back, self.number_problem, width=back)
            self.one("combine", self.summed, self.sum_problem, width=back, is_whole=True)
        if self.is_low_latency:
            both = there + back
            self.one(PAIR, self.pair, self.number_problem, width=both)
            self.one(PAIR, self.whole_pair, self.sum_problem, width=both, is_whole=True)

    def one(
        self, name: str, call: Call, check: Check, *, width: int, is_whole: bool = False
    ) -> None:
        """Times a call: in a graph, or with a cold cache."""
        take = self.stage.clock.graph if self.is_low_latency else self.stage.clock.events
        clock = "graph" if self.is_low_latency else "events"
        blank = self.stage.blank(name, self.form, clock, width=width)
        if is_whole:
            blank = replace(blank, system=f"{blank.system}, gather, sum")
        figure = self.stage.measure(blank, lambda: take(call, check))
        self.stage.explain(figure, call)

    def there(self) -> Tensor:
        """Rows to where they belong: `[N, bytes]`."""
        return self.exchanged(self.rows, self.truth.num_received, self.truth.num_sent)

    def gathered(self) -> Tensor:
        """The same, from the tokens."""
        rows = self.x.index_select(0, self.truth.sent_tokens)
        return self.exchanged(rows, self.truth.num_received, self.truth.num_sent)

    def back(self) -> Tensor:
        """What the experts made of the rows, back: `[S, H]`."""
        return self.exchanged(self.outputs, self.truth.num_sent, self.truth.num_received)

    def summed(self) -> Tensor:
        """The same, and the sum of each token's rows, in fp32: `[T, H]`."""
        rows = self.back()
        total = torch.zeros(self.truth.mine.x.shape, dtype=torch.float32, device=rows.device)
        return total.index_add_(0, self.truth.sent_tokens, rows.float()).to(rows.dtype)

    def pair(self) -> Tensor:
        """There and back."""
        self.there()
        return self.back()

    def whole_pair(self) -> Tensor:
        """The same with gathering and summing."""
        self.gathered()
        return self.summed()

    def exchanged(self, rows: Tensor, num_in: list[int], num_out: list[int]) -> Tensor:
        """What arrives when every rank sends its rows."""
        arrived = rows.new_empty(sum(num_in), rows.size(1))
        dist.all_to_all_single(arrived, rows, num_in, num_out, group=self.stage.group)
        return arrived

    def rows_problem(self, got: Tensor) -> str:
        """What is wrong with rows that came."""
        return "" if torch.equal(got, self.wanted) else "rows"

    def number_problem(self, got: Tensor) -> str:
        """What is wrong with rows that came back, whose sums another measurement looks at."""
        return "" if len(got) == sum(self.truth.num_sent) else "number of rows"

    def sum_problem(self, got: Tensor) -> str:
        """What is wrong with the sums."""
        return sum_problem(self.stage, got)


def _packed(x: Tensor, form: str) -> Tensor:
    """Tokens as rows of bytes."""
    planes = (plane.contiguous().view(torch.uint8) for plane in encoded(x, form))
    return torch.cat(list(planes), dim=1)
