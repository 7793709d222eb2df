"""The 10-bit logarithmic format: rows on their way back at five eighths of their bytes.

A value keeps its sign and nine bits of its logarithm, spread over what lies between the smallest
and the largest magnitude of its block of 64 columns: the relative error is the same for large and
small values, and shrinks with the spread of the block. Which rows travel like this is decided
elsewhere; here is only the arithmetic.

T rows, H columns; B = ceil(H / 64) blocks, Q = ceil(H / 4) groups of four values. Columns beyond H
count as zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from crossdock.formats import RowFormat

__all__ = ["decode_log", "encode_log", "log_row"]

_BLOCK = 64
_TOP_CODE = 511
_SIGN = 512
_RANGE = 32.0
"""Powers of two that the codes of a block span at most."""
_MIN_STEP = 2.0**-14
"""Above twice the error of a float32 logarithm, so that a code is off by less than one half."""

_HIGHEST = 128 - 2.0**-17
"""A power of two of this is still finite in float32."""

_MAGNITUDE_BITS = 0x7FFFFFFF
_INFINITY_BITS = 0x7F800000

_CACHED = 1 << 17
"""Elements that are worked on together: as float32 they stay in a core's cache."""


def log_row(hidden: int) -> RowFormat:
    """The row of a token of this width: five bytes for four columns, two float32 for 64."""
    groups, blocks = -(-hidden // 4), -(-hidden // _BLOCK)
    return RowFormat(torch.uint8, 5 * groups, torch.float32, 2 * blocks, encoding="logfmt")


def encode_log(x: torch.Tensor) -> list[torch.Tensor]:
    """The planes of rows in the logarithmic format.

    For each block of 64 columns, with `m` its smallest magnitude that is not zero:

        top   = log2(max|x|)
        step  = max(min(top - log2(m), 32) / 510, 2**-14)
        code  = floor(511 + (log2|x| - top) / step + 1/2 - step * ln(2) / 8), between 0 and 511

    so that codes 511, 510, ... stand for 2**top, 2**(top - step), ... and 0 for zero. The last
    terms put the boundary between two codes halfway between their values, not their logarithms.

    | value | decoded |
    |---|---|
    | zero | zero, with its sign |
    | below 2**-32 of the block's largest (less half a step) | zero, with its sign |
    | any other, subnormal ones included | its sign; off by half a step: 2.2 % at 32 powers of two |
    | where all magnitudes of a block are equal | exact but for a float32 log2 and its inverse |
    | an infinity or a NaN in the block | NaN where a value is not zero |

    A block of zeros has top = step = 0; one with an infinity or a NaN has top = step = NaN.

    Logarithms are rounded as the device does it, so codes may differ by one between devices.

    A value is ten bits: the code, above it the sign. A row of `packed` is the low eight bits of 4Q
    values, then Q bytes: byte i has the two high bits of values i, i + Q, i + 2Q and i + 3Q, the
    first in its lowest bits.

    Args:
        x: [T, H] bf16, fp16 or fp32, any T and H; not changed.

    Returns:
        `[packed, ranges]`, contiguous: packed [T, 5Q] uint8, ranges [T, 2B] float32 holding top and
        step of block b in columns 2b and 2b + 1.
    """
    num_rows, hidden = x.shape
    row = log_row(hidden)
    packed = torch.empty((num_rows, row.hidden), dtype=torch.uint8, device=x.device)
    ranges = torch.empty((num_rows, row.num_scales), dtype=torch.float32, device=x.device)
    step = _rows_at_once(x)
    for rows in zip(x.detach().split(step), packed.split(step), ranges.split(step), strict=True):
        _encode_rows(*rows)
    return [packed, ranges]


def decode_log(planes: Sequence[torch.Tensor], hidden: int) -> torch.Tensor:
    """The rows that planes stand for: `2**(top - (511 - code) * step)` with the sign, or zero.

    Args:
        planes: packed [T, 5Q] uint8 and ranges [T, 2B] float32.
        hidden: H.

    Returns:
        [T, H] float32, contiguous.
    """
    packed, ranges = planes
    out = torch.empty((packed.shape[0], hidden), dtype=torch.float32, device=packed.device)
    step = _rows_at_once(out)
    for rows in zip(packed.split(step), ranges.split(step), out.split(step), strict=True):
        _decode_rows(*rows)
    return out


def _rows_at_once(rows: torch.Tensor) -> int:
    if rows.device.type == "cpu":
        return max(_CACHED // max(rows.shape[1], 1), 1)
    return max(rows.shape[0], 1)


def _in_blocks(rows: torch.Tensor) -> torch.Tensor:
    """[T, n] -> [T, B, 64]."""
    return rows.view(rows.shape[0], rows.shape[1] // _BLOCK, _BLOCK)


def _encode_rows(x: torch.Tensor, packed: torch.Tensor, ranges: torch.Tensor) -> None:
    values = torch.zeros(_padded_size(x), dtype=torch.float32, device=x.device)
    values[:, : x.shape[1]].copy_(x)
    bits = _in_blocks(values.view(torch.int32))
    magnitudes = bits & _MAGNITUDE_BITS
    codes = _codes(magnitudes, _ranges(magnitudes, ranges))
    codes.bitwise_or_(bits.bitwise_right_shift_(22).bitwise_and_(_SIGN))
    _pack(codes.flatten(1), packed)


def _padded_size(rows: torch.Tensor) -> tuple[int, int]:
    return rows.shape[0], -(-rows.shape[1] // _BLOCK) * _BLOCK


def _log2(bits: torch.Tensor) -> torch.Tensor:
    """Of the bits of magnitudes; finite for all of them, which also keeps torch's log2 fast."""
    return bits.clamp(min=1, max=_INFINITY_BITS - 1).view(torch.float32).log2_()


def _ranges(
    magnitudes: torch.Tensor, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Top and step of blocks, and which of them hold an infinity or a NaN; each [T, B]."""
    largest = magnitudes.amax(-1)
    # Bits are ordered as magnitudes are; less one, zeros are above all, the others hardly moved.
    smallest = (magnitudes - 1).bitwise_and_(_MAGNITUDE_BITS).amin(-1)
    top = _log2(largest).clamp_(max=_HIGHEST)
    span = (top - _log2(smallest)).clamp_(max=_RANGE)
    step = (span / (_TOP_CODE - 1)).clamp_(min=_MIN_STEP)
    spoiled = largest >= _INFINITY_BITS
    stored = torch.stack([top, step], -1).masked_fill_((largest == 0).unsqueeze(-1), 0.0)
    out.copy_(stored.masked_fill_(spoiled.unsqueeze(-1), math.nan).flatten(1))
    return top, step, spoiled


def _codes(
    magnitudes: torch.Tensor, ranges: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Codes without sign, int32; the magnitudes are used up."""
    top, step, spoiled = (of_block.unsqueeze(-1) for of_block in ranges)
    shift = _TOP_CODE + 0.5 - step * (math.log(2) / 8)
    shift.masked_fill_(spoiled, 1e9)  # any code but 0: the ranges make it NaN
    codes = _log2(magnitudes).sub_(top).mul_(step.reciprocal()).add_(shift)
    codes = codes.clamp_(0, _TOP_CODE).to(torch.int32)
    return codes.mul_(magnitudes.clamp_(max=1))  # zeros have code 0 however low the range is


def _pack(codes: torch.Tensor, packed: torch.Tensor) -> None:
    low, high = _halves(packed)
    words = codes[:, : low.shape[1]].to(torch.int16)
    low.copy_(words)  # torch keeps the low byte
    bits = words.bitwise_right_shift_(8).to(torch.uint8)
    first, second, third, fourth = bits.unflatten(1, (4, high.shape[1])).unbind(1)
    high.copy_(first | second << 2 | third << 4 | fourth << 6)


def _halves(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes with the low eight bits of values [T, 4Q], and those with the high two [T, Q]."""
    groups = packed.shape[1] // 5
    return packed[:, : 4 * groups], packed[:, 4 * groups :]


def _unpack(packed: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[T, 64B] int32, codes with sign; zero beyond 4Q."""
    low, high = _halves(packed)
    words = torch.zeros(size, dtype=torch.int32, device=packed.device)
    here = words[:, : low.shape[1]]
    here.copy_(low)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)
    bits = (high.unsqueeze(1) >> shifts.unsqueeze(-1)).bitwise_and_(3)
    here.add_(bits.flatten(1), alpha=256)
    return words


def _decode_rows(packed: torch.Tensor, ranges: torch.Tensor, out: torch.Tensor) -> None:
    words = _unpack(packed, _padded_size(out))
    signs = (words & _SIGN).mul_(-(1 << 22))
    codes = words.bitwise_and_(_TOP_CODE)
    top, step = ranges.unflatten(1, (ranges.shape[1] // 2, 1, 2)).unbind(-1)
    powers = _in_blocks((codes - _TOP_CODE).to(torch.float32)).mul_(step).add_(top).exp2_()
    bits = powers.flatten(1).view(torch.int32).mul_(codes.clamp_(max=1))
    hidden = out.shape[1]
    torch.bitwise_or(bits[:, :hidden], signs[:, :hidden], out=out.view(torch.int32))
