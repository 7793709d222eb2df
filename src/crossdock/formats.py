"""Token formats as records: how one token's bytes are laid out.

A format says what the payload elements are and what scales travel beside them. Moving rows never
needs more than that; the arithmetic of encoding and decoding lives in `codec`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch

from crossdock.errors import ShapeError

__all__ = ["ELEMENT_CODES", "TokenFormat", "check_element", "check_scale", "describe_code"]

ELEMENT_CODES = MappingProxyType(
    {
        torch.bfloat16: 1,
        torch.float16: 2,
        torch.float32: 3,
        torch.float8_e4m3fn: 4,
        torch.float8_e5m2: 5,
        torch.int8: 6,
        torch.uint8: 7,
    }
)
"""Payload element -> number that headers carry, so that ranks can compare what they send."""

_SCALE_CODES = MappingProxyType({torch.float32: 1, torch.int32: 2})


@dataclass(frozen=True)
class TokenFormat:
    """The layout of one token row.

    Attributes:
        element: dtype of the payload.
        hidden: payload elements in a row.
        scale: dtype of the scales, or None when the row has none.
        num_scales: scales in a row; 0 without scales.
    """

    element: torch.dtype
    hidden: int
    scale: torch.dtype | None = None
    num_scales: int = 0

    @property
    def payload_bytes(self) -> int:
        """Bytes of one row's payload."""
        return self.hidden * self.element.itemsize

    @property
    def scale_bytes(self) -> int:
        """Bytes of one row's scales."""
        return 0 if self.scale is None else self.num_scales * self.scale.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one row on the wire."""
        return self.payload_bytes + self.scale_bytes

    @property
    def code(self) -> int:
        """A number that is equal on two ranks exactly when element, scale and counts are."""
        scales = 0 if self.scale is None else self.num_scales * 4 + _SCALE_CODES[self.scale]
        return (scales << 8) + ELEMENT_CODES[self.element]

    def __str__(self) -> str:
        text = f"{str(self.element).removeprefix('torch.')}[{self.hidden}]"
        if self.scale is None:
            return text
        return f"{text} + {str(self.scale).removeprefix('torch.')}[{self.num_scales}]"


def describe_code(code: int) -> str:
    """A format code in words, for error messages."""
    names = {value: str(dtype).removeprefix("torch.") for dtype, value in ELEMENT_CODES.items()}
    scales = code >> 8
    text = names.get(code & 255, "none")
    if not scales:
        return text
    kinds = {value: str(dtype).removeprefix("torch.") for dtype, value in _SCALE_CODES.items()}
    return f"{text} with {scales // 4} {kinds.get(scales % 4, 'unknown')} scales"


def check_element(dtype: torch.dtype) -> None:
    """Raise `ShapeError` unless rows of `dtype` can be moved."""
    if dtype not in ELEMENT_CODES:
        names = ", ".join(str(known).removeprefix("torch.") for known in ELEMENT_CODES)
        raise ShapeError("x", got=str(dtype).removeprefix("torch."), expected=f"one of {names}")


def check_scale(dtype: torch.dtype) -> None:
    """Raise `ShapeError` unless scales of `dtype` can be moved."""
    if dtype not in _SCALE_CODES:
        raise ShapeError("x[1] (scales)", got=str(dtype), expected="float32 or int32 (packed)")
