"""Formats as records: how a token is encoded, and how the bytes of its row are laid out.

A `TokenFormat` says which elements and scales stand for a token of any width; a `RowFormat` is the
bytes of one row, and moving rows never needs more than that. The arithmetic of encoding and
decoding lives in `codec`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

import torch

from crossdock.errors import ConfigError, ShapeError

__all__ = [
    "BF16",
    "ELEMENT_CODES",
    "FP8_BLOCK128",
    "FP8_ROUND_SCALE",
    "FP8_UE8M0",
    "INT8_ROW",
    "RowFormat",
    "ScaleRule",
    "TokenFormat",
    "check_element",
    "check_scale",
    "describe_code",
]

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
class RowFormat:
    """The bytes of one row.

    Attributes:
        element: dtype of the payload.
        hidden: payload elements in a row.
        scale: dtype of the scales, or None when the row has none.
        num_scales: scales in a row; 0 without scales.
        encoding: name of the format that the bytes are in; empty when the caller alone knows.
    """

    element: torch.dtype
    hidden: int
    scale: torch.dtype | None = None
    num_scales: int = 0
    encoding: str = ""

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
        """A number that is equal on two ranks when encoding, element, scale and counts are."""
        scales = 0 if self.scale is None else self.num_scales * 4 + _SCALE_CODES[self.scale]
        return (_name_code(self.encoding) << 40) + (scales << 8) + ELEMENT_CODES[self.element]

    def __str__(self) -> str:
        text = f"{str(self.element).removeprefix('torch.')}[{self.hidden}]"
        if self.scale is None:
            return text
        return f"{text} + {str(self.scale).removeprefix('torch.')}[{self.num_scales}]"


class ScaleRule(Enum):
    """How the scale of a block follows from its largest magnitude `amax`.

    `limit` is the largest value of the element: 127 for int8, 448 for fp8 e4m3.
    """

    NONE = "none"
    """No scale: elements are moved as they are."""
    QUOTIENT = "quotient"
    """`scale = amax / limit`, float32; elements are `x * (limit / amax)`."""
    RECIPROCAL = "reciprocal"
    """`factor = limit / amax`, `scale = 1 / factor`, float32; elements are `x * factor`."""
    POWER_OF_TWO = "power of two"
    """`amax / limit` rounded up to a power of two, float32; elements are `x / scale`."""
    UE8M0 = "ue8m0"
    """The same as biased exponent bytes, four to an int32, the first block in the lowest byte."""


@dataclass(frozen=True)
class TokenFormat:
    """How a token of any width is encoded.

    Attributes:
        name: for errors; the ranks compare it.
        element: dtype of the payload: bfloat16 (moved bit for bit), fp8 or int8.
        rule: how scales are found.
        block: columns that share a scale; 0 for the whole row.
        min_amax: a block's `amax` is taken to be at least this.
    """

    name: str
    element: torch.dtype
    rule: ScaleRule = ScaleRule.NONE
    block: int = 0
    min_amax: float = 0.0

    def __post_init__(self) -> None:
        if self.element not in _LIMITS and self.element != torch.bfloat16:
            raise ConfigError(f"tokens are not encoded as {self.element}")
        if (self.rule is ScaleRule.NONE) != (self.element == torch.bfloat16):
            raise ConfigError(f"{self.element} does not go with scale rule '{self.rule.value}'")

    @property
    def limit(self) -> float:
        """The largest value of the element, that the largest magnitude of a block is mapped to."""
        return _LIMITS[self.element]

    def row(self, hidden: int) -> RowFormat:
        """The row of a token of this width.

        Raises:
            ShapeError: `hidden` does not divide into blocks (four blocks to an int32 with UE8M0).
        """
        if self.rule is ScaleRule.NONE:
            return RowFormat(self.element, hidden, encoding=self.name)
        packed = self.rule is ScaleRule.UE8M0
        multiple = self.block * (4 if packed else 1)
        if multiple and (hidden % multiple or not hidden):
            nearest = max(round(hidden / multiple), 1) * multiple
            expected = f"a multiple of {multiple} for {self.name}, such as {nearest}"
            raise ShapeError("hidden", got=hidden, expected=expected)
        scale = torch.int32 if packed else torch.float32
        num_scales = hidden // multiple if multiple else 1
        return RowFormat(self.element, hidden, scale, num_scales, encoding=self.name)


_LIMITS = MappingProxyType(
    {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}
)

_FP8 = torch.float8_e4m3fn

BF16 = TokenFormat("bf16", torch.bfloat16)
"""The row itself."""
FP8_BLOCK128 = TokenFormat("fp8", _FP8, ScaleRule.QUOTIENT, block=128, min_amax=1e-4)
"""fp8 e4m3 with a float32 scale for 128 columns."""
FP8_ROUND_SCALE = TokenFormat(
    "fp8 with round_scale", _FP8, ScaleRule.POWER_OF_TWO, block=128, min_amax=1e-4
)
"""The same with scales that are powers of two."""
FP8_UE8M0 = TokenFormat("fp8 with ue8m0", _FP8, ScaleRule.UE8M0, block=128, min_amax=1e-4)
"""The same with packed exponents as scales."""
INT8_ROW = TokenFormat("int8", torch.int8, ScaleRule.RECIPROCAL)
"""int8 with one float32 scale for a row: the format of DeepEP-Ascend."""

_KNOWN = (BF16, FP8_BLOCK128, FP8_ROUND_SCALE, FP8_UE8M0, INT8_ROW)


def _name_code(name: str) -> int:
    return zlib.crc32(name.encode()) & 0x7FFFFF if name else 0


def describe_code(code: int) -> str:
    """A format code in words, for error messages."""
    encoding = code >> 40
    if encoding:
        known = {_name_code(form.name): form.name for form in _KNOWN}
        return f"{known.get(encoding, 'another format')} ({describe_code(code & ((1 << 40) - 1))})"
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
