"""Time a function on the host, or what it runs by the names that torch's profiler sees."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

__all__ = ["bench", "bench_kineto"]


def bench(
    fn: Callable[[], object],
    num_warmups: int = 50,
    num_tests: int = 50,
    post_fn: Callable[[], object] | None = None,
) -> tuple[float, float, float]:
    """Host time of one call of `fn`, with the device idle before and after.

    Args:
        fn: what is timed.
        num_warmups: calls before the timed ones.
        num_tests: timed calls, at least 1.
        post_fn: called after each timed call, outside the measured time.

    Returns:
        (mean, smallest, largest) in seconds.

    **Sync**: the host waits for the current CUDA device around each timed call, if CUDA is in use.
    """
    for _ in range(num_warmups):
        fn()
    times = []
    for _ in range(num_tests):
        times.append(_time_one_call(fn))
        if post_fn is not None:
            post_fn()
    return sum(times) / len(times), min(times), max(times)


def bench_kineto(
    fn: Callable[[], object],
    kernel_names: str | Sequence[str],
    num_tests: int = 30,
    suppress_kineto_output: bool = False,
    trace_path: str | None = None,
    barrier_comm_profiling: bool = False,
    num_kernels_per_period: int = 1,
) -> float | list[float] | list[float | list[float]]:
    """Mean time of what `fn` runs under given names: kernels on CUDA, torch's operators elsewhere.

    Args:
        fn: called once to warm up, then `num_tests` times under torch's profiler.
        kernel_names: a part of a name, or several. An operator right inside another of that name
            does not count again.
        num_tests: profiled calls, at least 1.
        suppress_kineto_output: nothing that is printed meanwhile is shown.
        trace_path: file to write a Chrome trace to; None for none.
        barrier_comm_profiling: first wait for all ranks of the default group, if there is one.
        num_kernels_per_period: how often a call of `fn` runs each name.

    Returns:
        For one name seconds, or a list of as many as a call runs, in order; for several names a
        list of that.

    **Collective**: with `barrier_comm_profiling`, all ranks of the default group.
    **Sync**: the host waits for the current CUDA device, if CUDA is in use.

    Raises:
        ValueError: a name did not run `num_kernels_per_period` times in each call. On CPU no
            operation of crossdock is a kernel with a name.
    """
    fn()
    _wait_for_device()
    if barrier_comm_profiling and dist.is_initialized():
        dist.barrier()
    silence = _silence() if suppress_kineto_output else contextlib.nullcontext()
    with silence, profile(activities=_activities()) as profiler:
        for _ in range(num_tests):
            fn()
        _wait_for_device()
    if trace_path is not None:
        profiler.export_chrome_trace(trace_path)
    events = _on_device(list(profiler.events() or ()))
    if isinstance(kernel_names, str):
        return _means(events, kernel_names, num_tests, num_kernels_per_period)
    return [_means(events, name, num_tests, num_kernels_per_period) for name in kernel_names]


def _activities() -> list[ProfilerActivity]:
    on_cuda = [ProfilerActivity.CUDA] if torch.cuda.is_initialized() else []
    return [ProfilerActivity.CPU, *on_cuda]


def _on_device(events: list[FunctionEvent]) -> list[FunctionEvent]:
    """The events of kernels, or all if there are none."""
    return [event for event in events if event.device_type.name != "CPU"] or events


def _means(
    events: list[FunctionEvent], name: str, num_tests: int, num_per_call: int
) -> float | list[float]:
    times = _seconds(events, name)
    if len(times) != num_tests * num_per_call:
        expected = f"{num_tests} calls * {num_per_call}"
        raise ValueError(f"{name!r} ran {len(times)} times, expected {expected}; see `bench`")
    means = [sum(times[place::num_per_call]) / num_tests for place in range(num_per_call)]
    return means[0] if num_per_call == 1 else means


def _seconds(events: list[FunctionEvent], name: str) -> list[float]:
    """How long the events of this name took, in their order, but for those right inside another."""
    spans = [
        event.time_range
        for event in events
        if name in event.name and (event.cpu_parent is None or name not in event.cpu_parent.name)
    ]
    spans.sort(key=lambda span: span.start)
    return [span.elapsed_us() * 1e-6 for span in spans]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Whatever this process writes to its standard output and error meanwhile is dropped."""
    kept = [(stream, os.dup(stream)) for stream in (1, 2)]
    with tempfile.TemporaryFile() as nowhere:
        for stream, _ in kept:
            os.dup2(nowhere.fileno(), stream)
        try:
            yield
        finally:
            for stream, before in kept:
                os.dup2(before, stream)
                os.close(before)


def _time_one_call(fn: Callable[[], object]) -> float:
    _wait_for_device()
    start = time.perf_counter()
    fn()
    _wait_for_device()
    return time.perf_counter() - start


def _wait_for_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
