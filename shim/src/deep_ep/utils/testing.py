"""Time a function. Timing by kernel name is absent: it needs kernels that carry those names."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["bench"]


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


def _time_one_call(fn: Callable[[], object]) -> float:
    _wait_for_device()
    start = time.perf_counter()
    fn()
    _wait_for_device()
    return time.perf_counter() - start


def _wait_for_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
