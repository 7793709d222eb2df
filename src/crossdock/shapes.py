"""Whether a tensor has the dtype and shape that it should have.

What is looked at of a tensor is its *meta*: dtype, shape and device. Checks that need no more take
that, so that they can be remembered for all tensors of the same.
"""

from __future__ import annotations

import torch

from crossdock.errors import ShapeError

__all__ = ["Meta", "check_meta", "check_tensor", "meta"]

Meta = tuple[torch.dtype, torch.Size, torch.device] | None
"""Dtype, shape and device of a tensor; None where there is none."""


def meta(value: torch.Tensor | None) -> Meta:
    """Dtype, shape and device of a tensor."""
    return None if value is None else (value.dtype, value.shape, value.device)


def check_meta(
    name: str, value: Meta, *, dtype: torch.dtype, shape: tuple[int | None, ...]
) -> None:
    """Raise `ShapeError` unless a tensor is there and has this dtype and shape.

    Args:
        name: of the tensor.
        value: what is known of it.
        dtype: what it must have.
        shape: as well; None in it stands for any length.
    """
    if value is not None and value[0] == dtype and len(value[1]) == len(shape):
        for wanted, have in zip(shape, value[1], strict=True):
            if wanted is not None and wanted != have:
                break
        else:
            return
    sizes = ", ".join("any" if length is None else str(length) for length in shape)
    got = None if value is None else f"{_name(value[0])} {list(value[1])}"
    raise ShapeError(name, got=got, expected=f"{_name(dtype)} [{sizes}]")


def check_tensor(
    name: str,
    value: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    shape: tuple[int | None, ...],
) -> torch.Tensor:
    """The tensor, if it has this dtype and shape; None in the shape stands for any length.

    Raises:
        ShapeError: it has not, or is missing.
    """
    check_meta(name, meta(value), dtype=dtype, shape=shape)
    if value is None:
        raise ShapeError(name, got=None, expected="a tensor")
    return value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
