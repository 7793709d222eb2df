"""Tensors as the kernels of low-latency calls take them, or why they cannot; rows of the heap."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from crossdock.device.engine import Engine
from crossdock.device.memory import Generation
from crossdock.errors import UnsupportedError
from crossdock.ops.triton import expert_records
from crossdock.shapes import Meta
from crossdock.verbs import Stats

__all__ = [
    "address_of",
    "check_operands",
    "show",
    "then_copy",
    "tokens_at",
    "unreachable",
    "writable",
]


def then_copy(
    receive: Callable[[], None], source: torch.Tensor, out: torch.Tensor
) -> Callable[[], None]:
    """The receiving half of a call, after which what it brought is copied to where it belongs."""

    def run() -> None:
        receive()
        out.copy_(source)

    return run


def address_of(tensor: torch.Tensor | None) -> int:
    """Where a tensor lies; where there is none, an address that will not be looked at."""
    return 0 if tensor is None else tensor.data_ptr()


def unreachable(x: Meta, others: Sequence[Meta], engine: Engine) -> str:
    """Why kernels here cannot reach some tensors, or write to them; empty if they can."""
    where = None if x is None else x[2]
    if where is None or where.type not in engine.device_types:
        return f"the device transport moves {engine.device_types} tensors, x is on {where}"
    for other in others:
        if other is not None and other[2] != where:
            return f"x is on {where}, another argument on {other[2]}"
    return ""


def check_operands(trouble: str, stats: Stats) -> None:
    """Raise `UnsupportedError` for tensors that kernels cannot take."""
    if trouble:
        raise UnsupportedError(trouble)
    for counted in stats:
        if counted is not None and not counted.is_contiguous():
            raise UnsupportedError("the device transport counts in contiguous tensors alone")


def tokens_at(
    x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor | None
) -> expert_records.Tokens:
    """What the kernel is told of tokens."""
    address = x.data_ptr()
    return expert_records.Tokens(address, address, idx.data_ptr(), address_of(weights))


def writable(out: torch.Tensor) -> torch.Tensor:
    """The tensor, or one in its place where kernels cannot write to it."""
    fits = out.is_contiguous() and out.data_ptr() % 16 == 0
    return out if fits else torch.empty(out.shape, dtype=out.dtype, device=out.device)


def show(
    memory: Generation,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    *,
    at: int,
    row: int,
    slots: int,
) -> torch.Tensor:
    """Rows of this rank's heap, [R, M, ...], of which each source has `slots`, at least M.

    Args:
        memory: the heap.
        dtype: of their elements.
        shape: [R, M], or [R, M, columns].
        at: where the first one begins.
        row: bytes from slot to slot.
        slots: of a source.
    """
    own = memory.shown.get(dtype)
    if own is None:
        own = memory.shown[dtype] = memory.own.view(dtype)
    size = dtype.itemsize
    strides = (slots * row // size, row // size, 1)[: len(shape)]
    return own.as_strided(shape, strides, (memory.own.storage_offset() + at) // size)
