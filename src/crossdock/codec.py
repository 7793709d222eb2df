"""Rows of any format as planes of bytes, and back.

A plane is a contiguous [T, width] tensor; a row of tokens is the same row of every plane. Payload
and scales travel as two planes, so that each arrives as a contiguous tensor and nobody has to pick
them apart. High-throughput rows are moved bit for bit: `split` and `join` do no arithmetic. Tokens
of the low-latency mode are encoded as a `TokenFormat` says, by `encode`; `decode` undoes it. What
the fields of a record mean is said in `formats`, the format of the way back in `logfmt`.

T tokens, H hidden; a block is the columns that share a scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

from crossdock.errors import ShapeError
from crossdock.formats import RowFormat, ScaleRule, TokenFormat, check_element, check_scale
from crossdock.shapes import Meta, meta

__all__ = [
    "AnyTokens",
    "Tokens",
    "decode",
    "empty_scales",
    "encode",
    "format_of",
    "join",
    "metas",
    "place_scales",
    "row_format",
    "split",
]

Tokens = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""What callers pass as `x`: rows, or rows and their scales."""

AnyTokens = TypeVar("AnyTokens", torch.Tensor, tuple[torch.Tensor, torch.Tensor])
"""The same where the result is of the kind that was passed."""

_CACHED = 1 << 18
"""Elements that are worked on together: as float32 they stay in a core's cache."""

_ENCODED = (torch.bfloat16, torch.float16, torch.float32)

_MANTISSA_BITS = 23
_INFINITY_BITS = 0x7F800000


def row_format(x: Tokens) -> RowFormat:
    """The format of `x`.

    Raises:
        ShapeError: not two-dimensional, an element that is not moved, or scales of another length.
    """
    return format_of(metas(x))


def metas(x: Tokens) -> tuple[Meta, ...]:
    """What there is to know of `x` beside its bytes."""
    if isinstance(x, tuple):
        data, scales = x
        return meta(data), meta(scales)
    return (meta(x),)


def format_of(planes: tuple[Meta, ...]) -> RowFormat:
    """The format of rows, from what is known of their payload, and of their scales.

    Raises:
        ShapeError: see `row_format`.
    """
    data, *rest = planes
    if data is None or len(data[1]) != 2:
        got = None if data is None else f"shape {tuple(data[1])}"
        raise ShapeError("x", got=got, expected="[num_tokens, hidden]")
    dtype, (num_tokens, hidden), _ = data
    check_element(dtype)
    if not rest or rest[0] is None:
        return RowFormat(dtype, hidden)
    dtype_of_scales, shape, _ = rest[0]
    if len(shape) != 2 or shape[0] != num_tokens:
        expected = f"[{num_tokens}, number of scales]"
        raise ShapeError("x[1] (scales)", got=f"shape {tuple(shape)}", expected=expected)
    check_scale(dtype_of_scales)
    return RowFormat(dtype, hidden, dtype_of_scales, shape[1])


def split(x: Tokens) -> list[torch.Tensor]:
    """The planes of `x`, contiguous; a copy only where `x` was not."""
    parts = x if isinstance(x, tuple) else (x,)
    return [part.detach().contiguous() for part in parts]


def join(planes: Sequence[torch.Tensor], like: AnyTokens) -> AnyTokens:
    """Planes as the caller of `like` expects them: a tensor, or a tensor and its scales."""
    if isinstance(like, torch.Tensor):
        return planes[0]
    return planes[0], planes[1]


def encode(x: torch.Tensor, form: TokenFormat) -> list[torch.Tensor]:
    """The planes of tokens in a format.

    Everything is float32 arithmetic, each operation rounded once, on one block at a time:

        amax      max(max|x|, form.min_amax)
        scale     QUOTIENT      amax / limit
                  RECIPROCAL    1 / factor
                  POWER_OF_TWO  2**e, the smallest that is not below amax / limit, e >= -126
                  UE8M0         the byte e + 127
        factor    QUOTIENT, RECIPROCAL    limit / amax
                  POWER_OF_TWO, UE8M0     2**-e
        element   x * factor, rounded to the nearest value of the element, ties to even

    The exponent `e` is taken from the bits of the float32 quotient. `x * factor` may come out a
    little above the limit; the nearest value of the element is then the limit.

    | a block that holds | payload | scale | decoded |
    |---|---|---|---|
    | zeros | zeros, in fp8 with their sign | of `min_amax`; without: 0, or 2**-126 | zeros |
    | so little that `factor` overflows | the same | RECIPROCAL: 0; QUOTIENT: amax / limit | zeros |
    | subnormal numbers | as any other number | | |
    | an infinity, no NaN | fp8: all NaN (byte 0x7F); int8: all 0 | inf; UE8M0: 255 | all NaN |
    | a NaN | the same | NaN; POWER_OF_TWO: inf; UE8M0: 255 | all NaN |

    Bytes are the same on every device and do not depend on the rows beside them.

    Args:
        x: [T, H] bf16, fp16 or fp32, any T; not changed. A format without scales takes bf16 only.
        form: the format.

    Returns:
        Without scales `[x]` itself. Else `[payload, scales]`, contiguous, in memory of their own:
        payload [T, H] of `form.element`, scales [T, num_scales] float32, or int32 with UE8M0
        (block 4i in the lowest byte of word i; bytes beyond the last block are 0).

    Raises:
        ShapeError: another dtype, not two-dimensional, or H does not divide into blocks.
    """
    _check_tokens(x, form)
    row = form.row(x.shape[1])
    if row.scale is None:
        return [x]
    payload = torch.empty(x.shape, dtype=row.element, device=x.device)
    size = (x.shape[0], row.num_scales)
    scales = torch.zeros(size, dtype=row.scale, device=x.device)
    for rows in _row_blocks(x.detach(), payload, scales):
        _encode_rows(*rows, form=form)
    return [payload, scales]


def decode(planes: Sequence[torch.Tensor], form: TokenFormat) -> torch.Tensor:
    """The tokens that planes stand for: payload times scale, rounded once to float32.

    A NaN in the payload or in a scale gives NaN, and so does a UE8M0 scale of 255; the table of
    `encode` says where they come from. A product beyond float32 is an infinity; it takes a token
    above 15/16 of float32's largest, rounded up in fp8.

    Args:
        planes: payload [..., H] and, if the format has them, scales [..., num_scales]; any strides.
        form: the format they are in.

    Returns:
        [..., H] float32, contiguous, in memory of its own.
    """
    if form.rule is ScaleRule.NONE:
        return planes[0].to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    payload, scales = planes
    out = torch.empty(payload.shape, dtype=torch.float32, device=payload.device)
    values = _values(form.element, payload.device)
    for rows in _row_blocks(_rows(payload.view(torch.uint8)), _rows(scales), _rows(out)):
        _decode_rows(*rows, form=form, values=values)
    return out


def _check_tokens(x: torch.Tensor, form: TokenFormat) -> None:
    if x.dim() != 2:
        raise ShapeError("x", got=f"shape {tuple(x.shape)}", expected="[num_tokens, hidden]")
    accepted = (form.element,) if form.rule is ScaleRule.NONE else _ENCODED
    if x.dtype not in accepted:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
        got = str(x.dtype).removeprefix("torch.")
        raise ShapeError("x", got=got, expected=f"{names} for {form.name}")


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _row_blocks(*planes: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same few rows of every plane at a time on a CPU, all of them elsewhere; none if empty."""
    num_rows, hidden = planes[0].shape
    if not planes[0].numel():
        return iter(())
    step = max(_CACHED // hidden, 1) if planes[0].device.type == "cpu" else num_rows
    return zip(*(plane.split(step) for plane in planes), strict=True)


def _in_blocks(rows: torch.Tensor, form: TokenFormat) -> torch.Tensor:
    width = form.block or rows.shape[1]
    return rows.view(rows.shape[0], rows.shape[1] // width, width)


def _encode_rows(
    x: torch.Tensor, payload: torch.Tensor, scales: torch.Tensor, *, form: TokenFormat
) -> None:
    blocks = _in_blocks(x.to(torch.float32, copy=True), form)
    amax = _largest(blocks).clamp_(min=form.min_amax)
    scale, factor = _scale_and_factor(amax, form)
    scales.copy_(scale)
    blocks.mul_(factor.unsqueeze(-1))
    if form.element == torch.int8:
        blocks.round_()
    payload.copy_(blocks.flatten(1))
    _spoil(_in_blocks(payload.view(torch.uint8), form), ~amax.isfinite(), form)


def _largest(blocks: torch.Tensor) -> torch.Tensor:
    """[T, n] largest magnitude, NaN where there is one; twice as fast as over `blocks.abs()`."""
    return torch.maximum(blocks.amax(-1), blocks.amin(-1).neg_()).abs_()


def _scale_and_factor(amax: torch.Tensor, form: TokenFormat) -> tuple[torch.Tensor, torch.Tensor]:
    # Never a number: with one, torch multiplies by its reciprocal, which rounds twice.
    limit = torch.full_like(amax, form.limit)
    if form.rule in (ScaleRule.POWER_OF_TWO, ScaleRule.UE8M0):
        exponent = _exponent(amax / limit)
        factor = _power_of_two((254 - exponent).clamp_(min=0))
        packed = form.rule is ScaleRule.UE8M0
        return (_pack(exponent) if packed else _power_of_two(exponent)), factor
    factor = limit / amax
    scale = amax / limit if form.rule is ScaleRule.QUOTIENT else factor.reciprocal()
    return scale.masked_fill_(scale.isnan(), math.nan), factor.masked_fill_(factor.isinf(), 0.0)


def _exponent(quotient: torch.Tensor) -> torch.Tensor:
    """Biased exponent of the smallest power of two that fits, 1 to 254; 255 for inf and NaN."""
    bits = quotient.abs().view(torch.int32).clamp_(max=_INFINITY_BITS)
    bits.add_((1 << _MANTISSA_BITS) - 1)  # carries unless it is a power of two
    return torch.clamp(bits >> _MANTISSA_BITS, min=1)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    return torch.bitwise_left_shift(exponent, _MANTISSA_BITS).view(torch.float32)


def _byte_shifts(device: torch.device) -> torch.Tensor:
    return torch.arange(0, 32, 8, dtype=torch.int32, device=device)


def _pack(exponent: torch.Tensor) -> torch.Tensor:
    """[T, n] -> [T, ceil(n / 4)] int32, the first of four in the lowest byte."""
    num_rows, num_blocks = exponent.shape
    padded = torch.nn.functional.pad(exponent, (0, -num_blocks % 4))
    groups = padded.view(num_rows, padded.shape[1] // 4, 4)
    return torch.sum(groups << _byte_shifts(exponent.device), -1, dtype=torch.int32)


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    """[T, n] int32 -> [T, 4n] float32, what the exponent bytes stand for."""
    exponent = (packed.unsqueeze(-1) >> _byte_shifts(packed.device)) & 255
    return exponent.to(torch.uint8).view(torch.float8_e8m0fnu).to(torch.float32).flatten(1)


def _spoil(blocks: torch.Tensor, spoiled: torch.Tensor, form: TokenFormat) -> None:
    """Give blocks with an infinity or a NaN bytes that do not depend on the device."""
    if spoiled.device.type == "cpu" and not bool(spoiled.any()):
        return  # asking is faster here; elsewhere the host would wait for the answer
    blocks.masked_fill_(spoiled.unsqueeze(-1), 0 if form.element == torch.int8 else 0x7F)


def _values(element: torch.dtype, device: torch.device) -> torch.Tensor:
    """[256] float32, what each byte stands for; looking up is faster than torch's cast of fp8."""
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    return codes.view(element).to(torch.float32)


def _decode_rows(
    codes: torch.Tensor,
    scales: torch.Tensor,
    out: torch.Tensor,
    *,
    form: TokenFormat,
    values: torch.Tensor,
) -> None:
    torch.index_select(values, 0, codes.flatten().to(torch.int32), out=out.view(-1))
    blocks = _in_blocks(out, form)
    scale = _unpack(scales) if form.rule is ScaleRule.UE8M0 else scales
    blocks.mul_(scale[:, : blocks.shape[1], None])


def empty_scales(
    form: TokenFormat, hidden: int, *, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor | None:
    """Room for the scales of encoded rows, as grouped matrix products want them.

    Args:
        form: how the rows are encoded.
        hidden: H.
        shape: of the rows, without H.
        device: of the result.

    Returns:
        [*shape, number of scales] with the last two dimensions column-major; [*shape] where the
        whole row has one scale; None where it has none.
    """
    row = form.row(hidden)
    if row.scale is None:
        return None
    if not form.block:
        return torch.empty(shape, dtype=row.scale, device=device)
    turned = (*shape[:-1], row.num_scales, shape[-1])
    return torch.empty(turned, dtype=row.scale, device=device).transpose(-1, -2)


def place_scales(
    rows: torch.Tensor, slots: torch.Tensor, scales: torch.Tensor, *, slab_rows: int
) -> None:
    """Write scales to their slots, whatever the strides.

    Args:
        rows: [p, number of scales].
        slots: [p] int64, counted over all slabs.
        scales: as `empty_scales` makes it, of one or two dimensions of rows.
        slab_rows: rows of a slab, if there are two.
    """
    where = (slots // slab_rows, slots % slab_rows) if slab_rows else (slots,)
    scales[where] = rows.squeeze(1) if scales.dim() == len(where) else rows
