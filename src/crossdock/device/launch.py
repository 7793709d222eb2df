"""How kernels are launched: quickly, after the first time.

Triton looks at every argument of every launch, which takes longer than some kernels run. Here
arguments are numbers alone, and a kernel is compiled for any numbers of their widths, so what was
compiled for some constants serves every launch with the same constants, and is launched directly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver

from crossdock import _env
from crossdock.device.constants import constants

__all__ = ["Kernel", "model_of", "starter"]

_Arguments = tuple[tuple[int, ...], ...]
_Start = Callable[[int, _Arguments, torch.cuda.Stream | None], None]
"""Launches so many programs with these arguments on a stream, or on the current one."""


class Kernel:
    """A kernel with its constants, compiled when it is first launched.

    Args:
        function: the Triton function; takes named tuples of numbers, then constants.
        *values: the constants, named tuples or single ones.
        num_warps: of each program.
        overlaps: whether its programs may come before the kernel before it is over; they then wait
            for that themselves.
    """

    def __init__(
        self, function: Any, *values: object, num_warps: int, overlaps: bool = False
    ) -> None:
        self._function = function
        self._constants = tuple(constants(v) if isinstance(v, tuple) else v for v in values)
        self.options = {"num_warps": num_warps} | ({"launch_pdl": True} if overlaps else {})
        self._start: _Start | None = None
        self._interpreted = _env.interprets_kernels()
        self._marks = _env.marks_launches()

    def launch(
        self,
        num_programs: int,
        arguments: _Arguments,
        *,
        stream: torch.cuda.Stream | None = None,
        half: str = "",
    ) -> None:
        """Launch it.

        Args:
            num_programs: of the grid.
            arguments: named tuples of numbers.
            stream: None for the current one.
            half: "send" or "receive" where it is launched in two, for the names of ranges.
        """
        start = self._start
        if start is None:
            start = self._start = self._prepare(arguments)
        if not self._marks:
            start(num_programs, arguments, stream)
            return
        with torch.cuda.nvtx.range(f"crossdock {self._function.__name__} {half}".rstrip()):
            start(num_programs, arguments, stream)

    def launch_halves(
        self,
        sizes: tuple[int, int],
        arguments: _Arguments,
        *,
        hooked: bool,
    ) -> Callable[[], None]:
        """Launch so many programs, and so many; the second half later if it is hooked.

        Returns:
            What launches the second half, if that is still to be done, or does nothing.
        """
        first, second = sizes
        if not hooked:
            self.launch(first + second, arguments)
            return _nothing
        self.launch(first, arguments, half="send")
        return partial(self.launch, second, arguments, half="receive")

    def _prepare(self, arguments: _Arguments) -> _Start:
        """What launches it from now on."""
        function, constants = self._function, self._constants
        if self._interpreted:
            return lambda num, numbers, _: function[(num,)](*numbers, *constants)
        return starter(self._compile(arguments), constants)

    def _compile(self, arguments: _Arguments) -> Any:
        """The kernel for numbers that are nothing in particular."""
        models = [model_of(type(argument)) for argument in arguments]
        return self._function.warmup(*models, *self._constants, grid=(1,), **self.options)


def starter(compiled: Any, constants: tuple[object, ...]) -> _Start:
    """What launches a compiled kernel on the device it was compiled for.

    Triton finds device, stream and what to tell profilers anew at every launch. Here that is left
    out, as long as no profiler has hooks in Triton and Triton is built as this expects.

    Args:
        compiled: the kernel.
        constants: behind the arguments of every launch.
    """

    def start_slowly(
        num_programs: int, arguments: _Arguments, stream: torch.cuda.Stream | None
    ) -> None:
        with torch.cuda.stream(stream):
            compiled[(num_programs, 1, 1)](*arguments, *constants)

    try:
        run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
        before, after = knobs.runtime.launch_enter_hook.calls, knobs.runtime.launch_exit_hook.calls
    except AttributeError:
        return start_slowly
    stream_of, device = driver.active.get_current_stream, driver.active.get_current_device()
    no_hooks = (None, None, None)

    def start(num_programs: int, arguments: _Arguments, stream: torch.cuda.Stream | None) -> None:
        if before or after:
            start_slowly(num_programs, arguments, stream)
            return
        handle = stream_of(device) if stream is None else stream.cuda_stream
        run(num_programs, 1, 1, handle, function, packed, *no_hooks, *arguments, *constants)

    return start


_MODELS = MappingProxyType({"Address": (1 << 40) + 3, "int": 3})
"""Triton compiles for the width of a number, and anew where it is 1 or a multiple of 16."""


def model_of(kind: Any) -> tuple[int, ...]:
    """Numbers as wide as those of a kind of named tuple."""
    widths = (getattr(hint, "__forward_arg__", hint) for hint in kind.__annotations__.values())
    model: tuple[int, ...] = kind(*(_MODELS[str(width)] for width in widths))
    return model


def _nothing() -> None:
    """The receiving half of a call that is over."""
