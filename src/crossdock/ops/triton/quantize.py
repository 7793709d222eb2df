"""Encoding in registers: the bytes of `crossdock.codec` and `crossdock.logfmt`, inside any kernel.

Device functions, called by kernels that hold a row as a tile of float32, a block of columns to each
row of the tile. What the bytes mean is said in the two files named above, and their tables hold
here: tokens have the same bytes on every device. So nothing is left to a fast division, or to a
product fused with a sum; maxima are those of bits, which are ordered as magnitudes are, NaN above
all; and where the hardware has no cast to fp8, elements are rounded with integers. Where a row
lies, and when it may be written, is the business of the calling kernel.

Every rule, every element that tokens are encoded as and every size of block is supported. A tile's
sides are powers of two: a block that is none leaves columns of its row empty, and a block that is
the whole row is a tile of one row. What is empty holds 0.0, and so do columns beyond H.

H columns of a row; [B, W] the tile, B not less than the blocks of a row; Q = ceil(H / 4).
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "E4M3",
    "E5M2",
    "INT8",
    "POWER_OF_TWO",
    "QUOTIENT",
    "RECIPROCAL",
    "UE8M0",
    "decode_log",
    "encode_log",
    "encode_part",
    "encode_row",
    "largest",
    "load_log",
    "load_ranges",
    "pack_exponents",
    "store_log",
]

QUOTIENT = tl.constexpr("quotient")
RECIPROCAL = tl.constexpr("reciprocal")
POWER_OF_TWO = tl.constexpr("power of two")
UE8M0 = tl.constexpr("ue8m0")
"""Rules by which scales are found, as `formats.ScaleRule` names them."""

E4M3 = tl.constexpr(4)
E5M2 = tl.constexpr(5)
INT8 = tl.constexpr(6)
"""Elements, as `formats.ELEMENT_CODES` numbers them."""

MAGNITUDE = tl.constexpr(0x7FFFFFFF)
INFINITY = tl.constexpr(0x7F800000)
NAN = tl.constexpr(0x7FC00000)
FRACTION = tl.constexpr(0x7FFFFF)
"""Of the bits of a float32."""

LOG_BLOCK = tl.constexpr(64)
TOP_CODE = tl.constexpr(511)
SIGN = tl.constexpr(512)
RANGE = tl.constexpr(32.0)
MIN_STEP = tl.constexpr(2.0**-14)
HIGHEST = tl.constexpr(128 - 2.0**-17)
"""Of the logarithmic format; `logfmt` explains each."""

LN_2 = tl.constexpr(0.6931471805599453)
LOG_SERIES = tl.constexpr(
    (
        1.442667841911316,
        -0.7205854654312134,
        0.4735533893108368,
        -0.32590189576148987,
        0.19429421424865723,
        -0.07955765724182129,
        0.015529895201325417,
    )
)
"""`log2(1 + f) / f` in powers of f; times f it is off by at most 3.1e-7 for f from 0 to 1."""


@triton.jit
def encode_row(
    values,
    RULE: tl.constexpr,
    ELEMENT: tl.constexpr,
    MIN_AMAX: tl.constexpr,
    USE_CASTS: tl.constexpr,
):
    """The codes and scales of a row, equal to those of `codec.encode`.

    Args:
        values: [B, W] float32, a block to a row of the tile, 0.0 where there is no column.
        RULE: one of the names above.
        ELEMENT: one of the numbers above.
        MIN_AMAX: a block's largest magnitude is taken to be at least this.
        USE_CASTS: let the hardware round to fp8, which gives the same bytes with less work: for
            compute capability 8.9 and newer, not in the interpreter.

    Returns:
        Codes [B, W] uint8; scales [B], float32, or with UE8M0 exponents (0 to 255) as int32.

    Example (RULE=QUOTIENT, ELEMENT=E4M3, MIN_AMAX=0.5): values=[[448, -1, 0, 2], [0, 0, 0, 224]]
        -> codes=[[126, 184, 0, 64], [0, 0, 0, 126]], scales=[1.0, 0.5]
    """
    return encode_part(values, largest(values), RULE, ELEMENT, MIN_AMAX, USE_CASTS)


@triton.jit
def largest(values):
    """The largest magnitude of each block, as bits, by which they are ordered: [B] int32."""
    return tl.max(values.to(tl.int32, bitcast=True) & MAGNITUDE, 1)


@triton.jit
def encode_part(
    values,
    size,
    RULE: tl.constexpr,
    ELEMENT: tl.constexpr,
    MIN_AMAX: tl.constexpr,
    USE_CASTS: tl.constexpr,
):
    """The same for some columns of blocks, where `size` is what is `largest` in all of them."""
    size = tl.maximum(size, tl.full([], MIN_AMAX, tl.float32).to(tl.int32, bitcast=True))
    scales, factor = _scale_and_factor(size, RULE, _limit_of(ELEMENT))
    factor = tl.where(size < INFINITY, factor, float("nan"))
    return _round(values * factor[:, None], ELEMENT, USE_CASTS), scales


@triton.constexpr_function
def _limit_of(element: int) -> float:
    """The largest value of an element."""
    return {E4M3.value: 448.0, E5M2.value: 57344.0, INT8.value: 127.0}[element]


@triton.constexpr_function
def _has_exponents(rule: str) -> bool:
    """Whether scales are powers of two."""
    return rule in (POWER_OF_TWO.value, UE8M0.value)


@triton.jit
def _scale_and_factor(size, RULE: tl.constexpr, LIMIT: tl.constexpr):
    """The scales of blocks, and what their values are multiplied by; `size` is the bits of amax."""
    amax = size.to(tl.float32, bitcast=True)
    limit = tl.full(size.shape, LIMIT, tl.float32)
    if _has_exponents(RULE):
        exponent = _fitting_exponent(tl.div_rn(amax, limit))
        scale = exponent if RULE == UE8M0 else (exponent << 23).to(tl.float32, bitcast=True)
        factor = (tl.maximum(254 - exponent, 0) << 23).to(tl.float32, bitcast=True)
    else:
        factor = tl.div_rn(limit, amax)
        if RULE == QUOTIENT:
            scale = tl.div_rn(amax, limit)
        else:
            tl.static_assert(RULE == RECIPROCAL, "there is no such rule")
            scale = tl.div_rn(tl.full(size.shape, 1.0, tl.float32), factor)
        # Devices have NaN of different bits.
        bits = tl.where(size > INFINITY, NAN, scale.to(tl.int32, bitcast=True))
        scale = bits.to(tl.float32, bitcast=True)
        factor = tl.where(factor == float("inf"), 0.0, factor)
    return scale, factor


@triton.jit
def _fitting_exponent(quotient):
    """Biased exponent of the smallest power of two that fits, 1 to 254; 255 for inf and NaN."""
    bits = tl.minimum(quotient.to(tl.int32, bitcast=True) & MAGNITUDE, INFINITY)
    return tl.maximum((bits + FRACTION) >> 23, 1)


@triton.jit
def pack_exponents(exponents):
    """Four exponents to a word, the first in its lowest byte; a single one to a word of its own.

    Stored one after the other as uint8, four exponents or more make the same bytes.

    Args:
        exponents: [B] int32.

    Returns:
        [B / 4] int32, or [1].

    Example: exponents=[1, 2, 0, 255] -> words=[-16776703]
    """
    if exponents.shape[0] == 1:
        words = exponents
    else:
        fours = tl.reshape(exponents, [exponents.shape[0] // 4, 4])
        words = tl.sum(fours << (8 * tl.arange(0, 4))[None, :], 1)
    return words


@triton.jit
def _round(values, ELEMENT: tl.constexpr, USE_CASTS: tl.constexpr):
    """Bytes of the nearest values of the element, ties to even; NaN is 0x7F in fp8, 0 in int8."""
    if ELEMENT == INT8:
        codes = _round_to_int8(values)
    elif USE_CASTS and ELEMENT == E4M3:
        codes = values.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    elif USE_CASTS:
        codes = values.to(tl.float8e5).to(tl.uint8, bitcast=True)
        # No value is that large, so it is the NaN that are not below: e5m2 has several.
        codes = tl.where(values < 65536.0, codes, 0x7F).to(tl.uint8)
    elif ELEMENT == E4M3:
        codes = _round_to_fp8(values, 3, -6)
    else:
        codes = _round_to_fp8(values, 2, -14)
    return codes


@triton.jit
def _round_to_int8(values):
    """For values between -127.5 and 127.5.

    Adding 1.5 * 2**23 makes the float unit round to whole numbers, and leaves them in the low bits,
    negative ones as two's complement. The values are products: the maximum, which changes none of
    them, keeps the sum from being fused with them.
    """
    shifted = tl.maximum(values, -128.0) + 12582912.0
    codes = shifted.to(tl.int32, bitcast=True) & 0xFF
    return tl.where(values > -128.0, codes, 0).to(tl.uint8)  # NaN is not greater


@triton.jit
def _round_to_fp8(values, BITS: tl.constexpr, LOWEST: tl.constexpr):
    """fp8 with so many bits of fraction, whose smallest normal number is 2**LOWEST.

    For magnitudes that are at most a little above its largest value.

    A normal number keeps the first bits of its fraction: adding half of what is cut off, less one
    where the last bit kept is 0, rounds. A subnormal one is a multiple of 2**(LOWEST - BITS):
    adding 2**23 times that makes the float unit do the same.
    """
    CUT: tl.constexpr = 23 - BITS
    HALF: tl.constexpr = (1 << (CUT - 1)) - 1
    SHIFT: tl.constexpr = (127 + CUT + LOWEST) << 23
    bits = values.to(tl.int32, bitcast=True)
    size = bits & MAGNITUDE
    normal = ((size + HALF + ((size >> CUT) & 1)) >> CUT) - ((126 + LOWEST) << BITS)
    shifted = size.to(tl.float32, bitcast=True) + 2.0 ** (CUT + LOWEST)
    subnormal = shifted.to(tl.int32, bitcast=True) - SHIFT
    code = tl.where(size < ((127 + LOWEST) << 23), subnormal, normal)
    return tl.where(size > INFINITY, 0x7F, code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def encode_log(values, H: tl.constexpr):
    """A row in the logarithmic format; codes may be off by one from those of `logfmt.encode_log`.

    Args:
        values: [B, 64] float32, a block to a row of the tile, 0.0 beyond H.
        H: columns of the row.

    Returns:
        `(low, high, top, step)`: the low bytes of values, [B, 64] uint8, of which those of columns
        below 4Q are stored; the bytes with the high bits, [Q, padded to a power of two] uint8, of
        which the first Q are stored; float32 [B] each.

    Example (H=4): values=[8, 4, -4, 0] -> low=[255, 1, 1, 0], high=[33], ranges=[3.0, 0.00196078]
    """
    tl.static_assert(values.shape[1] == LOG_BLOCK, "a block of this format has 64 columns")
    bits = values.to(tl.int32, bitcast=True)
    size = bits & MAGNITUDE
    largest = tl.max(size, 1)
    # Less one, as in `logfmt`: zeros are above all, the others hardly moved.
    smallest = tl.maximum(tl.min((size - 1) & MAGNITUDE, 1), 1)
    # Blocks of small numbers are taken 2**64 times larger: then the logarithm of a subnormal number
    # matters nowhere, because it is so far below the top that its code is 0.
    is_low = largest < ((127 - 90) << 23)
    factor = tl.where(is_low, 2.0**64, 1.0)
    top = tl.minimum(_log2(largest.to(tl.float32, bitcast=True) * factor), HIGHEST)
    span = tl.minimum(top - _log2(smallest.to(tl.float32, bitcast=True) * factor), RANGE)
    step = tl.maximum(span * (1 / (TOP_CODE - 1)), MIN_STEP)
    shift = tl.where(largest < INFINITY, TOP_CODE + 0.5 - step * (LN_2 / 8), 1e9)
    level = (_log2(values * factor[:, None]) - top[:, None]) * (1.0 / step)[:, None]
    level = tl.maximum(level + shift[:, None], 0.0)
    code = tl.where(size == 0, 0, tl.minimum(level, TOP_CODE + 0.0).to(tl.int32))
    word = code | ((bits >> 22) & SIGN)
    high = _high_bytes((word >> 8).to(tl.uint8), H)
    top = _stored(tl.where(is_low, top - 64.0, top), largest)
    return (word & 0xFF).to(tl.uint8), high, top, _stored(step, largest)


@triton.jit
def _log2(number):
    """Of a normal number's magnitude, off by 4e-7 before it is rounded; finite for any number.

    The exponent and a series for the fraction: far less work than a logarithm that is rounded well.
    """
    size = number.to(tl.int32, bitcast=True) & MAGNITUDE
    exponent = ((size >> 23) - 127).to(tl.float32)
    fraction = ((size & FRACTION) | (127 << 23)).to(tl.float32, bitcast=True) - 1.0
    series = tl.full(number.shape, LOG_SERIES[6], tl.float32)
    for power in tl.static_range(5, -1, -1):
        series = series * fraction + LOG_SERIES[power]
    return exponent + series * fraction


@triton.jit
def _stored(number, largest):
    """Top or step: 0 for a block of zeros, NaN for one with an infinity or a NaN."""
    number = tl.where(largest == 0, 0.0, number)
    return tl.where(largest < INFINITY, number, float("nan"))


@triton.jit
def _high_bytes(pairs, H: tl.constexpr):
    """Byte i from the two high bits of values i, i + Q, i + 2Q and i + 3Q; `pairs` is [B, 64]."""
    Q: tl.constexpr = (H + 3) // 4
    GROUPS: tl.constexpr = triton.next_power_of_2(Q)
    place = tl.arange(0, 4 * GROUPS)
    column = tl.minimum(place % 4 * Q + place // 4, pairs.numel - 1)
    fours = tl.gather(tl.reshape(pairs, [pairs.numel]), column, 0)
    fours = tl.reshape(fours, [GROUPS, 4]).to(tl.int32)
    return tl.sum(fours << (2 * tl.arange(0, 4))[None, :], 1).to(tl.uint8)


@triton.jit
def store_log(packed, ranges, values, H: tl.constexpr):
    """Encode a row to where it goes, and return what it is made of.

    Args:
        packed: address of its packed bytes, uint8.
        ranges: address of its ranges, float32.
        values: as `encode_log` takes them.
        H: columns of the row.

    Returns:
        Its bytes, uint8: those of columns [B, 64], and those behind them; 0 beyond the last.
    """
    Q: tl.constexpr = (H + 3) // 4
    low, high, top, step = encode_log(values, H)
    block = tl.arange(0, values.shape[0])[:, None]
    column = block * LOG_BLOCK + tl.arange(0, LOG_BLOCK)[None, :]
    tl.store(packed + column, low, mask=column < 4 * Q)
    group = tl.arange(0, high.shape[0])
    tl.store(packed + 4 * Q + group, high, mask=group < Q)
    pair = 2 * block + tl.arange(0, 2)[None, :]
    tl.store(ranges + pair, tl.join(top, step), mask=block * LOG_BLOCK < H)
    return tl.where(column < 4 * Q, low, 0), tl.where(group < Q, high, 0)


@triton.jit
def load_ranges(ranges, block, H: tl.constexpr):
    """Top and step of blocks [n] of a row, 0.0 beyond the last."""
    real = block * LOG_BLOCK < H
    top = tl.load(ranges + 2 * block, mask=real, other=0.0)
    return top, tl.load(ranges + 2 * block + 1, mask=real, other=0.0)


@triton.jit
def load_log(packed, column, top, step, H: tl.constexpr):
    """The values of columns of a row in the logarithmic format.

    Top and step are those of the block of each column, or are broadcast to that. For columns [n],
    get them by `load_ranges(ranges, column // 64, H)`. A tile [B, 64] with a block to each row is
    better: `load_ranges(ranges, block, H)` for blocks [B], each loaded once, and here
    `top[:, None]` and `step[:, None]`.

    Args:
        packed: address of the row's packed bytes, uint8.
        column: int32 of any shape.
        top: float32, see above.
        step: as well.
        H: columns of the row.

    Returns:
        float32 of the shape of `column`, 0.0 beyond H.

    Example (H=4): low=[255, 1, 1, 0], high=[33], ranges=[3.0, 0.00196078] -> values=[8, 4, -4, 0]
    """
    Q: tl.constexpr = (H + 3) // 4
    real = column < H
    low = tl.load(packed + column, mask=real, other=0).to(tl.int32)
    high = tl.load(packed + 4 * Q + column % Q, mask=real, other=0).to(tl.int32)
    pair = (high >> (column // Q * 2)) & 3
    return decode_log(low | (pair << 8), top, step)


@triton.jit
def decode_log(word, top, step):
    """What ten bits stand for: `2**(top - (511 - code) * step)` with the sign, or zero.

    The hardware may take a power that is subnormal for 0, but not a product: powers of blocks that
    can have one are taken 2**64 times too large first.
    """
    code = word & TOP_CODE
    is_low = top < -90.0
    power = tl.where(is_low, top + 64.0, top) + (code - TOP_CODE).to(tl.float32) * step
    size = tl.exp2(power) * tl.where(is_low, 2.0**-64, 1.0)
    bits = tl.where(code == 0, 0, size.to(tl.int32, bitcast=True))
    return (bits | ((word & SIGN) << 22)).to(tl.float32, bitcast=True)


@triton.jit
def round_sum(total: tl.tensor, ELEMENT: tl.constexpr, IS_COMPILED: tl.constexpr) -> tl.tensor:
    """A float32 sum in another dtype, to nearest even; the interpreter would cut bf16 off.

    Example: 1.0 + 2**-8 + 2**-16 as bf16 -> 1.0078125
    """
    if IS_COMPILED or (ELEMENT != tl.bfloat16):  # noqa: SIM300 - a comparison of constants
        return total.to(ELEMENT)
    else:
        bits = total.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        quiet = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.uint16)
        return quiet.to(tl.bfloat16, bitcast=True)
