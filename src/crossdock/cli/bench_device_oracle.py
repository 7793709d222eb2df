"""The library on GPUs before the oracle: a few tokens a rank, judged as on the CPU.

What `bench_device_truth.py` computes with index operations for thousands of tokens is right because
tests say so; this is the run's own witness. Nothing is timed here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock.cli.bench_device_cases import HIGH_THROUGHPUT
from crossdock.cli.bench_device_stage import Stage
from crossdock.cli.bench_low_latency import CrossdockSlabs, LowLatency
from crossdock.cli.bench_throughput import CrossdockContender, Throughput
from crossdock.cli.bench_world import Case, Contender, run_contenders

__all__ = ["judge_by_oracle"]


def judge_by_oracle(stage: Stage) -> None:
    """Says in the report what the oracle says of the library's results. Collective."""
    for form, case in _cases(stage).items():
        told = stage.clock.agreed(partial(_refusal, stage, case))
        refusals = sorted({why for why in stage.clock.gathered(told) if why})
        name = f"{stage.chapter}, {form}"
        stage.report.about[name] = "; ".join(refusals) or "what the library returns is right"
        if refusals:
            blank = replace(stage.blank("results", form, "oracle"), system="crossdock")
            why = f"wrong result: {'; '.join(refusals)}"
            stage.report.figures.append(replace(blank, why=why))


def _cases(stage: Stage) -> dict[str, Case]:
    """Form of tokens -> the case for the oracle."""
    sizes: dict[str, Any] = {
        "num_tokens": stage.chapter.num_tokens,
        "hidden": stage.setup.hidden,
        "num_experts": stage.setup.num_experts,
        "num_ranks": stage.setup.num_ranks,
        "num_topk": stage.setup.num_topk,
        "num_iters": 1,
        "transport": stage.setup.transport,
    }
    if stage.chapter.mode == HIGH_THROUGHPUT:
        return {"bf16": Throughput(**sizes)}
    return {form: LowLatency(form=form, **sizes) for form in stage.chapter.forms}


def _refusal(stage: Stage, case: Case) -> str:
    """What the oracle has against this rank's results; empty for nothing."""
    make = CrossdockContender if isinstance(case, Throughput) else CrossdockSlabs
    contenders = {"crossdock": lambda _, case: Ferried(make, stage, case)}
    return run_contenders(stage.meeting, case, contenders).refusals.get("crossdock", "")


class Ferried(Contender):
    """A contender on the device of a stage, for whom inputs and results stay on the CPU."""

    def __init__(
        self, make: Callable[[dist.ProcessGroup, Any], Contender], stage: Stage, case: Case
    ) -> None:
        self.inner, self.device = make(stage.group, case), stage.device

    def __repr__(self) -> str:
        return repr(self.inner)

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Any:
        """See `Contender`."""
        there = (tensor.to(self.device) for tensor in (x, topk_idx, topk_weights))
        received = self.inner.dispatch(*there)
        fields = received._asdict().items()
        back = {name: value.cpu() for name, value in fields if isinstance(value, torch.Tensor)}
        return received._replace(**back)

    def combine(self, x: Tensor, route: Any) -> Tensor:
        """See `Contender`."""
        return self.inner.combine(x.to(self.device), route).cpu()
