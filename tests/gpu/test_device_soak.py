"""Thousands of rounds on GPUs that are late by turns: no wrong row, and no growing process.

The soaks of the other transports: sizes change from round to round, hooks run in any order, and all
that torch allocates is NaN at first. Before some calls a GPU is busy with something else.
"""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
import torch

from tests.gpu.adapter import NEEDS_GPUS, DelayedBuffer, adapted
from tests.worlds import test_low_latency_soak, test_soak
from tests.worlds.device_worlds import poison_landings
from tests.worlds.test_high_throughput import poisoned_allocations

pytestmark = NEEDS_GPUS

NUM_ROUNDS = int(os.environ.get("CROSSDOCK_SOAK_ROUNDS", "2000"))
"""10000 for a night."""
SECONDS_A_ROUND = 0.2
POISON_EVERY = 50


class PoisonedBuffer(DelayedBuffer):
    """The memory that rows land in is overwritten now and then, when all ranks are there."""

    num_calls = 0

    def dispatch(self, *args: Any, **rest: Any) -> Any:
        self.num_calls += 1
        if self.num_calls % POISON_EVERY == 0:
            torch.cuda.synchronize()
            self.warmup(0, 1)
            poison_landings(self)
            torch.cuda.synchronize()
            self.warmup(0, 1)
        return super().dispatch(*args, **rest)


class InOrder(test_low_latency_soak.Rank):
    """Receives, before it makes a call, all calls of that kind but the last one."""

    def __init__(self, *args: Any, **rest: Any) -> None:
        super().__init__(*args, **rest)
        self.last: dict[str, Any] = {}

    def take_off(self, kind: str, flight: Any, *, has_hook: bool) -> None:
        self.last[kind] = flight
        super().take_off(kind, flight, has_hook=has_hook)

    def make_room(self, kind: str, *, most: int) -> None:
        for flight in list(self.flights[kind]):
            if not most or flight is not self.last[kind]:
                self.receive(kind, flight)


def soak_in_poison(group: Any, job: Any, *args: Any) -> Any:
    with (
        poisoned_allocations(),
        adapted(PoisonedBuffer),
        mock.patch.object(test_soak, "Buffer", PoisonedBuffer),
        mock.patch.object(test_low_latency_soak, "Rank", InOrder),
    ):
        return job(group, "device", *args)


def test_a_long_run_stays_right_and_small(pool: Any) -> None:
    judge_every = NUM_ROUNDS // 20
    job = (soak_in_poison, test_soak.soak, NUM_ROUNDS, judge_every)
    for seen in pool.run(*job, timeout_s=60 + SECONDS_A_ROUND * NUM_ROUNDS):
        assert seen.faults == []
        assert seen.num_judged == NUM_ROUNDS // judge_every
        assert len(seen.sizes) >= len(test_soak.PHASES), "the buffer was to grow several times"
        assert seen.final["files"] == seen.grown["files"]
        assert seen.final["resident"] - seen.grown["resident"] < 64 << 20


@pytest.mark.parametrize(
    ("rows", "names"),
    [("slab", ("bf16", "fp8_round_scale", "fp8")), ("compact", ("bf16", "int8"))],
)
def test_a_long_mixed_run_stays_right(pool: Any, rows: str, names: tuple[str, ...]) -> None:
    num_rounds = NUM_ROUNDS // 2
    job = (test_low_latency_soak.soak, num_rounds, num_rounds // 10, rows, names)
    seconds = 60 + SECONDS_A_ROUND * NUM_ROUNDS
    for seen in pool.run(soak_in_poison, *job, timeout_s=seconds):
        assert seen.faults == []
        assert seen.num_judged > 1.5 * num_rounds
        assert seen.num_overtaken > 0.02 * num_rounds
