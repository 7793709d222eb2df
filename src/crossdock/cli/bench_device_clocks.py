"""How the benchmark on GPUs takes the time of a call on one rank.

Three ways, since they answer different questions. *Events*: one call, from when the device could
begin it until its result can be used; the cache is cold, and the ranks begin together. *Graph*:
calls of a CUDA graph, one after the other, as a server replays them: no host in the way. *Wall*:
calls one after the other by the host's clock, with what the host needs for each.

On a CPU the same things are done with the host's clock, to rehearse. Whose time counts when the
ranks differ is the matter of `bench_device_cases.filled`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from crossdock import CrossdockError, UnsupportedError
from crossdock.cli.bench_device_cases import Samples

__all__ = ["Call", "Check", "Clock", "RefusedError"]

_NUM_WARMUPS = 3
_NUM_GRAPH_CALLS, _NUM_REPLAYS = 10, 15
_NUM_WALL_CALLS, _NUM_WALL_REPEATS = 20, 7
_NUM_PROFILED = 5
_CACHE_BYTES = 256 << 20  # several times the second-level cache of any GPU
_NUM_FLUSHES = 4  # a third of a millisecond, in which the host gets ahead of the device

Call = Callable[[], Any]
Check = Callable[[Any], str]
"""What is wrong with a result of the call; empty for nothing."""

_Result = TypeVar("_Result")


class RefusedError(CrossdockError):
    """Something could not be measured; raised on every rank, with the same text."""


class Clock:
    """Takes times on one rank; every method is collective over the ranks of the group.

    Args:
        group: The ranks, over which tensors of the device can be summed.
        meeting: The same ranks, for barriers of hosts.
        device: What is measured.
        num_iters: Single calls to time.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        meeting: dist.ProcessGroup,
        *,
        device: torch.device,
        num_iters: int,
    ) -> None:
        self.group, self.meeting, self.device = group, meeting, device
        self.num_iters = num_iters
        size = _CACHE_BYTES if device.type == "cuda" else 0
        self._cold = torch.empty(size, dtype=torch.uint8, device=device)
        self._token = torch.zeros(1, dtype=torch.float32, device=device)

    def events(self, call: Call, check: Check) -> Samples:
        """Times single calls, each with a cold cache.

        Raises:
            RefusedError: the call fails, or the first or the last result is wrong.
        """
        return self.alternating([(call, check)])[0]

    def alternating(self, calls: Sequence[tuple[Call, Check]]) -> list[Samples]:
        """The same for calls that must follow each other.

        Raises:
            RefusedError: as `events`.
        """
        for call, check in calls:
            self.agreed(partial(_demand_of, call, check))
        samples = [Samples([], []) for _ in calls]
        for number in range(_NUM_WARMUPS + self.num_iters):
            is_last = number == _NUM_WARMUPS + self.num_iters - 1
            for (call, check), kept in zip(calls, samples, strict=True):
                result, time_us, host_us = self._single(call)
                if number >= _NUM_WARMUPS:
                    kept.times_us.append(time_us)
                    kept.host_us.append(host_us)
                if is_last:
                    self.agreed(partial(_demand, check, result))
        return samples

    def graph(self, call: Call, check: Check) -> Samples:
        """Times calls in a CUDA graph: the mean of those of a replay, replay by replay.

        Raises:
            RefusedError: the call fails or cannot be captured, or what the last one leaves is
                wrong.
        """
        graph, result = self.agreed(lambda: self._captured(call))
        times = [self._replayed_us(graph) / _NUM_GRAPH_CALLS for _ in range(_NUM_REPLAYS)]
        self.agreed(partial(_demand, check, result))
        return Samples(times, [])

    def wall(self, call: Call, check: Check) -> Samples:
        """Times calls one after the other: with what the device has left, and the host's alone.

        Raises:
            RefusedError: the call fails, or the first or the last result is wrong.
        """
        self.agreed(partial(_demand_of, call, check))
        samples = Samples([], [])
        result = None
        for _ in range(_NUM_WALL_REPEATS):
            self.settle()
            call()  # brings the ranks together
            self.synchronize()
            began = time.perf_counter()
            for _ in range(_NUM_WALL_CALLS):
                result = call()
            returned = time.perf_counter()
            self.synchronize()
            ended = time.perf_counter()
            samples.times_us.append(1e6 * (ended - began) / _NUM_WALL_CALLS)
            samples.host_us.append(1e6 * (returned - began) / _NUM_WALL_CALLS)
        self.agreed(partial(_demand, check, result))
        return samples

    def kernels(self, call: Call) -> dict[str, tuple[float, float]]:
        """Says what a call runs on the device: kernel -> (runs, microseconds)."""
        if self.device.type != "cuda":
            return {}
        from torch.profiler import ProfilerActivity, profile

        call()
        self.settle()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(_NUM_PROFILED):
                call()
            self.synchronize()
        seen = [each for each in profiler.key_averages() if each.self_device_time_total > 0]
        return {
            each.key: (each.count / _NUM_PROFILED, each.self_device_time_total / _NUM_PROFILED)
            for each in seen
        }

    def agreed(self, step: Callable[[], _Result]) -> _Result:
        """Takes a step that may fail: on all ranks, or on none.

        Raises:
            RefusedError: it failed on some rank.
        """
        done, why = [], ""
        try:
            done.append(step())
        except RefusedError as error:
            why = str(error)
        except Exception as error:  # noqa: BLE001 - whatever it was, the others have to know
            why = f"{type(error).__name__}: {error}"
        told = self.gathered(why)
        if any(told):
            raise RefusedError(_summary(told))
        return done[0]

    def gathered(self, value: _Result) -> list[_Result]:
        """What every rank has, by rank."""
        values: list[Any] = [None] * self.meeting.size()
        dist.all_gather_object(values, value, group=self.meeting)
        return values

    def synchronize(self) -> None:
        """Waits for this rank's device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def settle(self) -> None:
        """Waits until all ranks have nothing to do."""
        self.synchronize()
        dist.barrier(group=self.meeting)

    def _single(self, call: Call) -> tuple[Any, float, float]:
        """The result of a call, its time and the host's, in microseconds."""
        for _ in range(_NUM_FLUSHES):
            self._cold.zero_()
        dist.all_reduce(self._token, group=self.group)  # on the stream: the ranks begin together
        watch = _EventWatch() if self.device.type == "cuda" else _HostWatch()
        began = time.perf_counter()
        result = call()
        host_us = 1e6 * (time.perf_counter() - began)
        return result, watch.stop_us(), host_us

    def _captured(self, call: Call) -> tuple[torch.cuda.CUDAGraph, Any]:
        """A graph of calls, and the result of the last of them."""
        if self.device.type != "cuda":
            raise UnsupportedError("a CUDA graph needs a GPU")
        call()
        call()
        self.settle()
        graph = torch.cuda.CUDAGraph()
        result = None
        # Other threads of the process, such as NCCL's, may go on with what they do.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(_NUM_GRAPH_CALLS):
                result = call()
        return graph, result

    def _replayed_us(self, graph: torch.cuda.CUDAGraph) -> float:
        """The time of a replay that follows another one: by then the ranks run in step."""
        self.settle()
        graph.replay()
        watch = _EventWatch()
        graph.replay()
        return watch.stop_us()


class _EventWatch:
    """Runs from when the stream reaches this point."""

    def __init__(self) -> None:
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        self._start.record()

    def stop_us(self) -> float:
        self._end.record()
        self._end.synchronize()
        return 1e3 * float(self._start.elapsed_time(self._end))


class _HostWatch:
    """Runs from now."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def stop_us(self) -> float:
        return 1e6 * (time.perf_counter() - self._start)


def _demand_of(call: Call, check: Check) -> None:
    _demand(check, call())


def _demand(check: Check, result: Any) -> None:
    problem = check(result)
    if problem:
        raise RefusedError(f"wrong result: {problem}")


def _summary(told: list[str]) -> str:
    """What the ranks say, in one line: once if all say the same, else the first that says why."""
    rank, why = next((rank, why) for rank, why in enumerate(told) if why)
    return why if set(told) == {why} else f"{why} (rank {rank})"
