"""Jobs of other transports, run on GPUs: what they give goes to the GPU, what they get comes back.

The jobs know CPU tensors alone, and so do the judges. `CudaBuffer` stands in for `Buffer`: it moves
tensors to the GPU and results back, waits for what it brings back, and writes to what a caller gave
to be written to. A handle of a low-latency call is known again by the `src_info` that stands for
it. Each rank has a GPU, and for each group of ranks an NCCL group.
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.weak import WeakTensorKeyDictionary

from crossdock import Buffer
from crossdock.worlds import Pool
from tests.worlds import (
    device_worlds,
    low_latency_worlds,
    test_device_failures,
    test_high_throughput,
    test_masks,
)

NUM_GPUS = torch.cuda.device_count()
NEEDS_GPUS = pytest.mark.skipif(NUM_GPUS < 2, reason=f"needs 2 GPUs, this machine has {NUM_GPUS}")
DEVICE = "cuda"
COMPILING_S = 400.0
"""Added to what a job may take: kernels are compiled for each of the many constants."""

LOW_LATENCY_STATS = ("cumulative_local_expert_recv_stats", "dispatch_wait_recv_cost_stats")

_MADE: dict[Any, dist.ProcessGroup] = {}
"""Of this process: gloo group of all ranks, and how many of them -> an NCCL group."""


class GpuPool(Pool):
    """Rank processes with a GPU each. A job is given an NCCL group and `CudaBuffer` as `Buffer`."""

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        num_ranks: int | None = None,
        timeout_s: float = 60.0,
    ) -> list[Any]:
        wanted = 4 if num_ranks is None else num_ranks
        if wanted > self.num_ranks:
            pytest.skip(f"needs {wanted} GPUs, this machine has {NUM_GPUS}")
        made = super().run(_on_gpu, wanted, fn, *args, timeout_s=timeout_s + COMPILING_S)
        return made[:wanted]


def _on_gpu(everyone: Any, num_ranks: int, fn: Callable[..., Any], *args: Any) -> Any:
    """The job, on the first ranks: all have to make their group, as torch numbers groups."""
    torch.cuda.set_device(dist.get_rank())
    group = nccl_group(everyone, num_ranks)
    if dist.get_rank() >= num_ranks:
        return None
    with adapted(CudaBuffer), device_worlds.poisoned_landings(), compiled_once():
        result = fn(group, *args)
        torch.cuda.synchronize()
        return result


def nccl_group(everyone: Any, num_ranks: int) -> dist.ProcessGroup:
    """An NCCL group of the first ranks, the same one each time until a job fails."""
    key = (everyone, num_ranks)
    if key not in _MADE:
        _MADE[key] = dist.new_group(list(range(num_ranks)), backend="nccl")
    return _MADE[key]


@contextmanager
def compiled_once() -> Iterator[None]:
    """What one process compiles, the others find in Triton's cache: they wait for it, once."""
    from triton import knobs

    from crossdock.device import launch

    compile_here, folder = launch.Kernel._compile, Path(knobs.cache.dir) / "locks"
    folder.mkdir(parents=True, exist_ok=True)

    def compile_in_turn(kernel: Any, arguments: Any) -> Any:
        function = kernel._function
        told = repr((function.__name__, function.cache_key, kernel._constants, kernel.options))
        lock = folder / hashlib.sha256(told.encode()).hexdigest()
        done = lock.with_suffix(".done")
        if not done.exists():
            with lock.open("w") as mine:
                fcntl.flock(mine, fcntl.LOCK_EX)
                if not done.exists():
                    made = compile_here(kernel, arguments)
                    done.touch()
                    return made
        return compile_here(kernel, arguments)

    with mock.patch.object(launch.Kernel, "_compile", compile_in_turn):
        yield


@contextmanager
def adapted(kind: type[Buffer]) -> Iterator[None]:
    """Jobs that make a `Buffer` make one of this kind."""
    with ExitStack() as stack:
        modules = (test_high_throughput, low_latency_worlds, test_device_failures, test_masks)
        for module in modules:
            stack.enter_context(mock.patch.object(module, "Buffer", kind))
        yield


def each_tensor(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same with tensors changed, in tuples, lists and dictionaries too."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: each_tensor(item, change) for name, item in value.items()}
    if not isinstance(value, (list, tuple)):
        return value
    items = [each_tensor(item, change) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def on_gpu(value: Any) -> Any:
    """Moved to the GPU; dense tensors keep their strides."""
    return each_tensor(value, lambda tensor: tensor.detach().to(DEVICE, copy=True))


def on_cpu(value: Any) -> Any:
    """Moved to the CPU, when all is there."""
    return each_tensor(value, lambda tensor: tensor.to("cpu", copy=True))


def given_by_name(method: Callable[..., Any], args: tuple, rest: dict) -> dict[str, Any]:
    """The arguments of a call by their names."""
    bound = inspect.signature(method).bind(None, *args, **rest)
    return dict(list(bound.arguments.items())[1:])


class Written:
    """Tensors of a caller that a call writes to, and those on the GPU that stand for them."""

    def __init__(self) -> None:
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._device = torch.cuda.current_device()

    def take(self, given: dict[str, Any], *names: str) -> dict[str, Any]:
        """Take what is written to out of the arguments; returns what stands for it on the GPU."""
        mine = {name: given.pop(name) for name in names if given.get(name) is not None}
        theirs = on_gpu(mine)
        self._pairs += [(mine[name], theirs[name]) for name in mine]
        return theirs

    def bring(self, value: Any) -> Any:
        """Results as they are now, on the CPU."""

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            mine = tensor.to("cpu", copy=True)
            self._pairs.append((mine, tensor))
            return mine

        return each_tensor(value, copy)

    def settle(self) -> None:
        """Write what is there by now."""
        with torch.cuda.device(self._device):
            for mine, theirs in self._pairs:
                mine.copy_(theirs)

    def after(self, hook: Callable[[], None] | None) -> Callable[[], None] | None:
        """The hook, which also writes."""
        if hook is None:
            return None

        def run() -> None:
            hook()
            self.settle()

        return run


class CudaBuffer(Buffer):
    """A `Buffer` on the GPU whose caller has CPU tensors."""

    def __init__(self, *args: Any, **rest: Any) -> None:
        super().__init__(*args, **rest)
        self._handles = WeakTensorKeyDictionary()

    def before_call(self) -> None:
        """What happens on the GPU before each call: nothing here."""

    def get_dispatch_layout(self, *args: Any, **rest: Any) -> Any:
        self.before_call()
        *made, event = super().get_dispatch_layout(*on_gpu(args), **on_gpu(rest))
        return (*self._after(event, made), event)

    def dispatch(self, *args: Any, **rest: Any) -> Any:
        return self._call(Buffer.dispatch, args, rest, "dispatch_wait_recv_cost_stats")

    def dispatch_views(self, *args: Any, **rest: Any) -> Any:
        return self._call(Buffer.dispatch_views, args, rest, "dispatch_wait_recv_cost_stats")

    def combine(self, *args: Any, **rest: Any) -> Any:
        return self._call(Buffer.combine, args, rest, "combine_wait_recv_cost_stats")

    def _call(self, method: Callable[..., Any], args: tuple, rest: dict, *stats: str) -> Any:
        self.before_call()
        given, written = given_by_name(method, args, rest), Written()
        theirs = written.take(given, *stats)
        *made, event = method(self, **on_gpu(given), **theirs)
        made = self._after(event, made)
        written.settle()
        return (*made, event)

    def _after(self, event: Any, made: Any) -> Any:
        event.current_stream_wait()
        return on_cpu(made)

    def low_latency_dispatch(self, *args: Any, **rest: Any) -> Any:
        self.before_call()
        given, written = given_by_name(Buffer.low_latency_dispatch, args, rest), Written()
        theirs = written.take(given, *LOW_LATENCY_STATS)
        made = super().low_latency_dispatch(**on_gpu(given), **theirs)
        x, count, handle, event, hook = made
        event.current_stream_wait()
        mine = written.bring((x, count, handle))
        self._handles[mine[2].src_info] = handle
        written.settle()
        return (*mine, event, written.after(hook))

    def low_latency_combine(self, *args: Any, **rest: Any) -> Any:
        self.before_call()
        given, written = given_by_name(Buffer.low_latency_combine, args, rest), Written()
        out, known = given.get("out"), {"handle": self._known(given.pop("handle"))}
        theirs = written.take(given, "out", "combine_wait_recv_cost_stats")
        made, event, hook = super().low_latency_combine(**on_gpu(given), **known, **theirs)
        event.current_stream_wait()
        combined = written.bring(made) if out is None else out
        written.settle()
        return combined, event, written.after(hook)

    def low_latency_dispatch_views(self, *args: Any, **rest: Any) -> Any:
        self.before_call()
        given, written = given_by_name(Buffer.low_latency_dispatch_views, args, rest), Written()
        theirs = written.take(given, "dispatch_wait_recv_cost_stats")
        views, event, hook = super().low_latency_dispatch_views(**on_gpu(given), **theirs)
        event.current_stream_wait()
        mine = written.bring(views)
        self._handles[mine.src_idx] = views
        written.settle()
        return mine, event, written.after(hook)

    def low_latency_combine_views(self, *args: Any, **rest: Any) -> Any:
        self.before_call()
        given, written = given_by_name(Buffer.low_latency_combine_views, args, rest), Written()
        out, views = given.get("out"), self._known_views(given.pop("views"))
        theirs = written.take(given, "out", "combine_wait_recv_cost_stats")
        made, event, hook = super().low_latency_combine_views(
            **on_gpu(given), views=views, **theirs
        )
        event.current_stream_wait()
        combined = written.bring(made) if out is None else out
        written.settle()
        return combined, event, written.after(hook)

    def get_next_low_latency_views_buffer(self, views: Any, hidden: int) -> torch.Tensor:
        return super().get_next_low_latency_views_buffer(self._known_views(views), hidden)

    def _known_views(self, views: Any) -> Any:
        """The views on the GPU; of another buffer, what is moved there."""
        original = self._handles.get(views.src_idx)
        return on_gpu(views) if original is None else original

    def get_next_low_latency_combine_buffer(self, handle: Any) -> torch.Tensor:
        return super().get_next_low_latency_combine_buffer(self._known(handle))

    def _known(self, handle: Any) -> Any:
        """The handle on the GPU in the same form; copies of it are moved there."""
        original = self._handles.get(handle[0])
        if original is None:
            return on_gpu(handle)
        parts = list(original)[: len(handle)]
        return type(handle)(*parts) if hasattr(handle, "_fields") else type(handle)(parts)


class DelayedBuffer(CudaBuffer):
    """The same on a GPU that is busy with something else before some of the calls."""

    def __init__(self, *args: Any, **rest: Any) -> None:
        super().__init__(*args, **rest)
        self._whims = random.Random(self.rank)

    def before_call(self) -> None:
        """Mostly nothing, sometimes a little, rarely long enough for all others to wait."""
        chance = self._whims.random()
        if chance < 0.2:
            spin(self._whims.random() * (5_000 if chance < 0.01 else 200))


def spin(microseconds: float) -> None:
    """Keep the current stream busy, roughly so long."""
    torch.cuda._sleep(int(microseconds * 1500))


def on_device(test: Callable[..., None], **instead: list[Any]) -> Callable[..., None]:
    """The same test for the device transport, with some parameters taking other values."""
    values = {"transport": ["device"], "num_ranks": [2, 4], **instead}
    marks = []
    for mark in test.pytestmark:
        names = mark.args[0] if mark.name == "parametrize" else None
        if names in values:
            mark = pytest.mark.parametrize(names, values[names]).mark  # noqa: PLW2901
        marks.append(mark)

    copy = type(test)(test.__code__, test.__globals__, test.__name__, test.__defaults__)
    copy.pytestmark, copy.__doc__ = marks, test.__doc__
    return copy
