"""What tests of the device calls share: ranks whose kernels are interpreted, and small worlds.

The interpreter runs the programs of a kernel one after another, each statement for itself. So there
are few tokens here; what they do is what they do in the tests that other transports go through,
with the same jobs and the same judges.
"""

from __future__ import annotations

import functools
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any
from unittest import mock

from crossdock import Buffer
from crossdock.cases import ROUTING_CASES, Routing, RoutingCase
from crossdock.device import rank_kernels
from crossdock.worlds import Pool
from tests.worlds import low_latency_worlds as low_latency

FEW_PROGRAMS = 4
POISON = 0xFF
REST_S = 5e-4


def release(package: str) -> tuple[int, ...]:
    """Major and minor version; () where it is not installed."""
    try:
        return tuple(int(number) for number in version(package).split(".")[:2])
    except PackageNotFoundError:
        return ()


def why_not_interpreted() -> str:
    """Why kernels cannot be interpreted here; empty if they can."""
    if not release("triton"):
        return "Triton is not installed"
    if not release("numpy"):
        return "Triton interprets kernels with NumPy, which is not installed"
    if release("numpy") >= (2, 4) and release("triton") < (3, 7):
        return "Triton before 3.7 cannot interpret kernels with NumPy 2.4 or newer"
    return ""


class InterpretedPool(Pool):
    """Rank processes in which Triton interprets kernels, which it decides when it is imported."""

    def run(self, fn: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        with interpreting():
            return super().run(_interpreted, fn, *args, **options)


@contextmanager
def interpreting() -> Iterator[None]:
    """Processes that are started meanwhile interpret kernels."""
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        yield


def _interpreted(group: Any, fn: Callable[..., Any], *args: Any) -> Any:
    # NumPy warns of NaN and infinities, which are among the numbers that are tried.
    of_numpy = {"category": RuntimeWarning, "module": r"triton\.runtime\.interpreter"}
    warnings.filterwarnings("ignore", **of_numpy)
    Buffer.set_num_sms(FEW_PROGRAMS)
    # Chunks stay as small as those of many programs, so that a few tokens are several of them.
    small_chunks = mock.patch.object(rank_kernels, "_FEW_PROGRAMS", 0)
    with quick_interpreter(), poisoned_landings(), small_chunks:
        return fn(group, *args)


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Kernels are interpreted twice as fast, and leave the processor to others when they wait.

    The interpreter changes Triton's language in every call of every function, which takes half of
    its time. Here it does so once for each module, for good: nothing is compiled in this process.
    """
    from triton.runtime import interpreter

    from crossdock.ops.triton import sync

    with (
        mock.patch.object(interpreter, "_patch_lang", _once(interpreter._patch_lang)),
        mock.patch.object(sync, "_now", _rest),
    ):
        yield


@functools.cache
def _once(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What changes the language for a function, but only for the first one of a module."""
    changed, restores_nothing = set(), SimpleNamespace(restore=lambda: None)

    def change_once(fn: Any) -> Any:
        if fn.__module__ not in changed:
            changed.add(fn.__module__)
            change(fn)
        return restores_nothing

    return change_once


def _rest(polls: Any, _: Any) -> Any:
    """What a wait does between two looks."""
    time.sleep(REST_S)
    return polls


@contextmanager
def poisoned_landings() -> Iterator[None]:
    """Where a job overwrites the memory that rows land in, it overwrites all of it."""
    poison = low_latency.poison

    def poison_all(buffer: Buffer) -> None:
        buffer.warmup(0, 1)
        poison_landings(buffer)
        poison(buffer)

    with mock.patch.object(low_latency, "poison", poison_all):
        yield


def poison_landings(buffer: Buffer) -> None:
    """Overwrite the rows of a heap, and nothing else. Nobody may be in a call."""
    memory = buffer._low_latency._engine._memory.current
    if memory is None:
        return
    have, own = memory.capacity, memory.heap.peer(buffer.rank)
    num_slots, num_tokens = (buffer.group_size * each for each in (have.slots, have.num_tokens))
    pieces = [
        *((zone.landing, num_slots * have.row_bytes) for zone in memory.plan.zones),
        *((zone.landing, num_slots * have.back_bytes) for zone in memory.plan.returns),
        (memory.plan.rows.landing, num_tokens * have.token_bytes),
        (memory.plan.back.landing, num_tokens * have.sum_bytes),
    ]
    for begin, nbytes in pieces:
        own[begin : begin + nbytes].fill_(POISON)


def small(most: int) -> Mapping[str, RoutingCase]:
    """The routing cases with at most so many tokens to a rank."""
    return {
        name: replace(case, num_tokens=tuple(min(num, most) for num in case.num_tokens))
        for name, case in ROUTING_CASES.items()
    }


def draw(case: str, num_ranks: int, *, most: int = 5) -> Routing:
    """A case of a low-latency call with few tokens."""
    return small(most)[case].make(num_ranks, seed=num_ranks)


def judge_case(case: str, num_ranks: int, name: str) -> low_latency.Right:
    """What `low_latency_worlds.judge_case` says, of few tokens."""
    routing = draw(case, num_ranks)
    return low_latency.judge(routing, low_latency.form_for(routing, name))
