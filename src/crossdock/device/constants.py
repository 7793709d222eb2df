"""Constants of kernels: sizes that kernels are compiled for."""

from __future__ import annotations

import functools
import math
from typing import TypeVar

import torch
import triton.language as tl

from crossdock import _env

__all__ = ["aligned", "constants", "next_power_of_two", "widest_word"]


def aligned(rows: torch.Tensor) -> torch.Tensor:
    """The rows, contiguous, beginning on a 16-byte bound; a copy only where they were not."""
    rows = rows.contiguous()
    return rows if rows.data_ptr() % 16 == 0 else rows.detach().clone()


def widest_word(num_bytes: int) -> int:
    """The widest word that every row of so many bytes begins and ends on, up to 16 bytes."""
    return math.gcd(num_bytes, 16) or 16


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


_Constants = TypeVar("_Constants", bound=tuple[object, ...])


@functools.cache
def constants(values: _Constants) -> _Constants:
    """The same under the same names, each of which a kernel may use wherever it needs a constant.

    The interpreter knows no constants, and takes plain values.
    """
    if _env.interprets_kernels():
        return values
    return type(values)(*(tl.constexpr(value) for value in values))
