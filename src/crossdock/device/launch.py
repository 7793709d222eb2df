"""How kernels are launched: quickly, after the first time.

Triton looks at every argument of every launch, which takes longer than some kernels run. Here
arguments are numbers alone, and a kernel is compiled for any numbers of their widths, so what was
compiled for some constants serves every launch with the same constants, and is launched directly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from crossdock import _env
from crossdock.device.constants import constants

__all__ = ["Kernel", "Launch", "model_of"]


class Kernel:
    """A kernel with its constants, compiled when it is first launched.

    Args:
        function: the Triton function; takes named tuples of numbers, then constants.
        *values: the constants, named tuples or single ones.
        num_warps: of each program.
    """

    def __init__(self, function: Any, *values: object, num_warps: int) -> None:
        self._function = function
        self._constants = tuple(constants(v) if isinstance(v, tuple) else v for v in values)
        self._num_warps = num_warps
        self._compiled: Any = None
        self._interpreted = _env.interprets_kernels()
        self._marks = _env.marks_launches()

    def launch(
        self, num_programs: int, arguments: tuple[tuple[int, ...], ...], *, half: str = ""
    ) -> None:
        """Launch it on the current stream.

        Args:
            num_programs: of the grid.
            arguments: named tuples of numbers.
            half: "send" or "receive" where it is launched in two, for the names of ranges.
        """
        if self._marks:
            name = f"crossdock {self._function.__name__} {half}".rstrip()
            with torch.cuda.nvtx.range(name):
                self._launch(num_programs, arguments)
        else:
            self._launch(num_programs, arguments)

    def _launch(self, num_programs: int, arguments: tuple[tuple[int, ...], ...]) -> None:
        if self._interpreted:
            self._function[(num_programs,)](*arguments, *self._constants)
            return
        if self._compiled is None:
            self._compiled = self._compile(arguments)
        self._compiled[(num_programs, 1, 1)](*arguments, *self._constants)

    def _compile(self, arguments: tuple[tuple[int, ...], ...]) -> Any:
        """The kernel for numbers that are nothing in particular."""
        models = [model_of(type(argument)) for argument in arguments]
        return self._function.warmup(
            *models, *self._constants, grid=(1,), num_warps=self._num_warps
        )


_MODELS = MappingProxyType({"Address": (1 << 40) + 3, "int": 3})
"""Triton compiles for the width of a number, and anew where it is 1 or a multiple of 16."""


def model_of(kind: Any) -> tuple[int, ...]:
    """Numbers as wide as those of a kind of named tuple."""
    widths = (getattr(hint, "__forward_arg__", hint) for hint in kind.__annotations__.values())
    model: tuple[int, ...] = kind(*(_MODELS[str(width)] for width in widths))
    return model


class Launch(NamedTuple):
    """A launch in two halves.

    Attributes:
        kernel, arguments: see `Kernel.launch`.
        alive: what must live until the second half has been launched.
    """

    kernel: Kernel
    arguments: tuple[tuple[int, ...], ...]
    alive: tuple[object, ...]

    def run(self, first: int, second: int, *, hooked: bool) -> Callable[[], None]:
        """Launch so many programs, and so many; the second half later if it is hooked.

        Returns:
            What launches the second half, if that is still to be done, or does nothing.
        """
        if not hooked:
            self.kernel.launch(first + second, self.arguments)
            return _nothing
        self.kernel.launch(first, self.arguments, half="send")
        return partial(self._receive, second)

    def _receive(self, num_programs: int) -> None:
        self.kernel.launch(num_programs, self.arguments, half="receive")


def _nothing() -> None:
    """The receiving half of a call that is over."""
