"""Encoded bytes, checked against the definitions of the formats in float64, and torch's casts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdock.codec import decode, encode
from crossdock.errors import ShapeError
from crossdock.formats import (
    BF16,
    FP8_BLOCK128,
    FP8_ROUND_SCALE,
    FP8_UE8M0,
    INT8_ROW,
    ScaleRule,
    TokenFormat,
)

E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
LIMITS = {E4M3: 448.0, E5M2: 57344.0, INT8: 127.0}
MANTISSA_BITS = {E4M3: 3, E5M2: 2}
SMALLEST_EXPONENT = {E4M3: -6, E5M2: -14}

NAMED = [FP8_BLOCK128, FP8_ROUND_SCALE, FP8_UE8M0, INT8_ROW]
OWN = [
    TokenFormat("e4m3 by 64", E4M3, ScaleRule.QUOTIENT, block=64, min_amax=1e-4),
    TokenFormat("e5m2 by 32", E5M2, ScaleRule.QUOTIENT, block=32),
    TokenFormat("e5m2 by 8, reciprocal", E5M2, ScaleRule.RECIPROCAL, block=8),
    TokenFormat("e5m2 by 16, packed", E5M2, ScaleRule.UE8M0, block=16),
    TokenFormat("e4m3 by row, packed", E4M3, ScaleRule.UE8M0),
    TokenFormat("int8 by 32", INT8, ScaleRule.RECIPROCAL, block=32),
    TokenFormat("int8 by 32, quotient", INT8, ScaleRule.QUOTIENT, block=32, min_amax=0.5),
    TokenFormat("int8 by row, powers of two", INT8, ScaleRule.POWER_OF_TWO),
]
IN_POWERS = (ScaleRule.POWER_OF_TWO, ScaleRule.UE8M0)


def by_name(form: TokenFormat) -> str:
    return form.name


def float32(values: torch.Tensor) -> torch.Tensor:
    """Rounded to float32, in float64: for products and quotients of float32 one rounding."""
    return values.float().double()


def number(value: float) -> torch.Tensor:
    """Torch divides a tensor by a tensor; a number it may replace by its reciprocal."""
    return torch.tensor(value, dtype=torch.float64)


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """In float64 exactly, which torch's power of tensors does not promise."""
    powers = torch.tensor([2.0**e for e in range(-200, 201)], dtype=torch.float64)
    return powers[exponent.long() + 200]


def byte_values(element: torch.dtype) -> torch.Tensor:
    """[256] float64: what each byte stands for, by the definition of the element."""
    if element == INT8:
        return torch.tensor([*range(128), *range(-128, 0)], dtype=torch.float64)
    bits, lowest = MANTISSA_BITS[element], SMALLEST_EXPONENT[element]
    values = []
    for byte in range(128):
        exponent, mantissa = divmod(byte, 1 << bits)
        significand = mantissa / (1 << bits) + (exponent > 0)
        values.append(significand * 2.0 ** (lowest + max(exponent - 1, 0)))
    largest = values.index(LIMITS[element])
    values[largest + 1 :] = [math.nan] * (127 - largest)
    if element == E5M2:
        values[largest + 1] = math.inf
    return torch.tensor(values + [-value for value in values], dtype=torch.float64)


def nearest(values: torch.Tensor, element: torch.dtype) -> torch.Tensor:
    """The nearest value of the element, in float64; of two the even one."""
    if element == INT8:
        return values.round()
    exponent = (torch.frexp(values).exponent - 1).clamp(min=SMALLEST_EXPONENT[element])
    step = power_of_two(exponent - MANTISSA_BITS[element])
    return ((values / step).round() * step).clamp(-LIMITS[element], LIMITS[element])


def fitting_exponent(quotient: float) -> int:
    """The smallest e with 2**e >= quotient that a normal float32 has; 128 for inf and NaN."""
    if not math.isfinite(quotient):
        return 128
    mantissa, exponent = math.frexp(quotient)
    return max(exponent - (mantissa == 0.5), -126) if quotient else -126


def expected(x: torch.Tensor, form: TokenFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Element values [T, H] and scales [T, blocks] (of powers of two: exponents), in float64."""
    blocks = x.double().view(len(x), -1, form.block or x.shape[1])
    limit = number(LIMITS[form.element])
    amax = blocks.abs().amax(-1).clamp(min=float(float32(number(form.min_amax))))
    scales = quotient = float32(amax / limit)
    factor = float32(limit / amax)
    if form.rule in IN_POWERS:
        powers = [fitting_exponent(value) for value in quotient.flatten().tolist()]
        scales = torch.tensor(powers, dtype=torch.float64).view_as(amax)
        factor = power_of_two(-scales)
    elif form.rule is ScaleRule.RECIPROCAL:
        scales = float32(number(1.0) / factor)
    elements = float32(blocks * factor.masked_fill(factor.isinf(), 0.0).unsqueeze(-1))
    lost = 0.0 if form.element == INT8 else math.nan
    elements = elements.masked_fill(~amax.isfinite().unsqueeze(-1), lost)
    return nearest(elements, form.element).view(x.shape), scales


def exponents(scales: torch.Tensor, form: TokenFormat, num_blocks: int) -> torch.Tensor:
    """Exponents of scales that are powers of two; 128 for those that are infinite or NaN."""
    if form.rule is ScaleRule.UE8M0:
        words = scales.long() & 0xFFFFFFFF
        found = torch.stack([words >> shift & 255 for shift in (0, 8, 16, 24)], -1).flatten(1)
        assert not found[:, num_blocks:].any(), "bytes beyond the last block are not 0"
        return found[:, :num_blocks].double() - 127
    mantissa, exponent = torch.frexp(scales.double())
    assert ((mantissa == 0.5) | scales.isinf()).all(), "not powers of two"
    return (exponent.double() - 1).masked_fill(scales.isinf(), 128.0)


def check(x: torch.Tensor, form: TokenFormat) -> None:
    """Every byte of the encoding is what the definition says."""
    payload, scales = encode(x, form)
    assert payload.dtype == form.element
    assert payload.shape == x.shape
    want, want_scales = expected(x, form)
    codes = payload.view(torch.uint8)
    got = byte_values(form.element)[codes.long()]
    assert torch.equal(got.nan_to_num(1e9), want.nan_to_num(1e9))
    assert (codes[want.isnan()] == 0x7F).all()
    if form.element != INT8:
        assert torch.equal(got.signbit()[~want.isnan()], x.signbit()[~want.isnan()])
    if form.rule in IN_POWERS:
        assert torch.equal(exponents(scales, form, want_scales.shape[1]), want_scales)
    else:
        assert torch.equal(scales.isnan(), want_scales.isnan())
        assert torch.equal(scales.double().nan_to_num(-1.0), want_scales.nan_to_num(-1.0))


def calc_diff(a: torch.Tensor, b: torch.Tensor) -> float:
    """1 - 2 sum(ab) / sum(aa + bb) in float64, after adding 1 to every element."""
    a, b = a.double() + 1, b.double() + 1
    return float(1 - 2 * (a * b).sum() / (a * a + b * b).sum())


def every_bf16() -> torch.Tensor:
    """All 65 536, ordered by their bits: 128 in a row have one sign and one exponent."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


BY_EXPONENT = every_bf16().view(-1, 1024)
"""Rows whose blocks of 128 have one exponent: zeros and subnormals, ..., infinities and NaN."""
SPREAD = every_bf16().view(-1, 128, 32).transpose(1, 2).reshape(-1, 1024)
"""Rows whose blocks of 128 span 32 exponents, so that most of a block is rounded coarsely."""


@pytest.mark.parametrize("form", NAMED + OWN, ids=by_name)
@pytest.mark.parametrize("x", [BY_EXPONENT, SPREAD], ids=["by exponent", "spread"])
def test_every_bf16_value_has_the_bytes_of_the_definition(x, form):
    check(x, form)


@pytest.mark.parametrize("rule", [rule for rule in ScaleRule if rule is not ScaleRule.NONE])
@pytest.mark.parametrize("element", [E4M3, E5M2, INT8])
def test_with_scale_1_the_bytes_are_those_of_torchs_cast(element, rule):
    limit = LIMITS[element]
    form = TokenFormat("scale 1", element, rule, block=64, min_amax=limit)
    small = every_bf16()[every_bf16().abs() <= limit]
    x = torch.nn.functional.pad(small, (0, -len(small) % 256)).view(1, -1)
    payload, scales = encode(x, form)
    cast = x.double().round().to(INT8) if element == INT8 else x.to(element)
    assert torch.equal(payload.view(torch.uint8), cast.view(torch.uint8))
    assert (scales == (0x7F7F7F7F if rule is ScaleRule.UE8M0 else 1.0)).all()


@pytest.mark.parametrize("element", [E4M3, E5M2, INT8])
def test_halfway_goes_to_the_even_byte_and_a_hair_beside_it_to_the_nearer(element):
    codes = byte_values(element)[:128]
    values = codes[codes <= LIMITS[element]]
    halfway = ((values[:-1] + values[1:]) / 2).float()
    infinity = torch.tensor(math.inf)
    ties = torch.stack([halfway, halfway.nextafter(-infinity), halfway.nextafter(infinity)])
    x = torch.cat([ties, -ties])
    form = TokenFormat("scale 1", element, ScaleRule.QUOTIENT, min_amax=LIMITS[element])
    got = encode(x, form)[0].view(torch.uint8).long()
    lower = torch.arange(len(halfway))
    want = torch.stack([lower + lower % 2, lower, lower + 1])
    negative = -want & 255 if element == INT8 else want + 128
    assert torch.equal(got, torch.cat([want, negative]))


@pytest.mark.parametrize("form", [FP8_BLOCK128, INT8_ROW, OWN[1], OWN[2]], ids=by_name)
def test_a_product_above_the_limit_becomes_the_limit(form):
    """For some largest magnitudes `x * (limit / amax)` comes out above the limit."""
    x = torch.zeros(1 << 14, form.block or 8, dtype=torch.float32)
    x[:, 3] = 1 + torch.arange(len(x)) / len(x)
    x[:, 5] = -x[:, 3]
    factor = torch.full_like(x[:, 3], form.limit) / x[:, 3]
    assert (x[:, 3] * factor > form.limit).any()
    payload = encode(x, form)[0].float()
    assert (payload[:, 3] == form.limit).all()
    assert (payload[:, 5] == -form.limit).all()


@pytest.mark.parametrize("form", [FP8_ROUND_SCALE, FP8_UE8M0, OWN[3], OWN[7]], ids=by_name)
def test_power_of_two_scales_are_the_smallest_that_fit(form):
    """The largest magnitude lies on a boundary between two scales, or next to it on either side."""
    boundary = form.limit * 2.0 ** torch.arange(-12, 100, dtype=torch.float32)
    infinity = torch.tensor(math.inf)
    beside = [boundary.nextafter(-infinity), boundary, boundary.nextafter(infinity)]
    x = torch.zeros(3, 112, form.block * 4 or 8, dtype=torch.float32)
    x[:, :, -1] = torch.stack(beside)
    payload, scales = encode(x.flatten(0, 1), form)
    num_blocks = x.shape[2] // form.block if form.block else 1
    found = exponents(scales, form, num_blocks)[:, -1].view(3, 112)
    below = torch.arange(-12, 100, dtype=torch.float64)
    assert torch.equal(found, torch.stack([below, below, below + 1]))
    assert (payload[:112, -1].float() == form.limit).all()


def test_ue8m0_has_the_first_block_in_the_lowest_byte():
    first = torch.arange(-6, 2, dtype=torch.float32)  # the last ones set the sign of their word
    x = (448 * 2.0**first).repeat_interleave(128).view(1, -1)
    scales = encode(x, FP8_UE8M0)[1]
    words = [
        int.from_bytes(bytes(some), "little", signed=True)
        for some in ([121, 122, 123, 124], [125, 126, 127, 128])
    ]
    assert scales.tolist() == [words]


@pytest.mark.parametrize("rule", [rule for rule in ScaleRule if rule is not ScaleRule.NONE])
@pytest.mark.parametrize("element", [E4M3, E5M2, INT8])
@pytest.mark.parametrize("worst", [math.inf, -math.inf, math.nan, -math.nan])
def test_an_infinity_or_a_nan_is_seen_in_its_whole_block_and_nowhere_else(element, rule, worst):
    form = TokenFormat("by 32", element, rule, block=32)
    x = torch.randn(5, 256, dtype=torch.float32)
    calm = encode(x, form)
    x[2, 70] = worst
    payload, scales = encode(x, form)
    lost = slice(64, 96)
    assert (payload[2, lost].view(torch.uint8) == (0 if element == INT8 else 0x7F)).all()
    decoded = decode([payload, scales], form)
    assert decoded[2, lost].isnan().all()
    decoded[2, lost] = decode(calm, form)[2, lost]
    assert torch.equal(decoded, decode(calm, form))
    if rule is ScaleRule.UE8M0:
        assert (scales[2, 0] >> 16 & 255) == 255
    elif rule is ScaleRule.POWER_OF_TWO:
        assert scales[2, 2] == math.inf
    else:
        bits = 0x7FC00000 if math.isnan(worst) else 0x7F800000
        assert scales.view(torch.int32)[2, 2] == bits


SMALLEST_AMAX = float(number(1e-4).float())


@pytest.mark.parametrize(
    ("form", "scale"),
    [
        (FP8_BLOCK128, SMALLEST_AMAX / 448),
        (FP8_ROUND_SCALE, 2.0**-22),
        (INT8_ROW, 0.0),
        (OWN[1], 0.0),
        (OWN[2], 0.0),
        (OWN[7], 2.0**-126),
    ],
)
def test_zeros_are_zeros_with_the_scale_of_their_rule(form, scale):
    x = torch.tensor([[0.0, -0.0] * 64, [0.0] * 128, [-0.0] * 128], dtype=torch.float32)
    payload, scales = encode(x, form)
    assert not payload.float().any()
    assert not scales.signbit().any()
    assert torch.equal(payload.float().signbit(), x.signbit() & (form.element != INT8))
    assert torch.equal(scales, torch.full_like(scales, scale))
    assert not decode([payload, scales], form).any()


@pytest.mark.parametrize("form", [FP8_BLOCK128, INT8_ROW, OWN[1], OWN[2]])
def test_magnitudes_whose_factor_is_beyond_float32_are_zeros(form):
    x = torch.tensor([[2.0**-126, -(2.0**-126)] * 64], dtype=torch.float32)
    payload, scales = encode(x, form)
    assert not payload.float().any()
    assert torch.equal(payload.float().signbit(), x.signbit() & (form.element != INT8))
    assert not decode([payload, scales], form).any()
    if form.rule is ScaleRule.RECIPROCAL:
        assert not scales.any()


def test_int8_of_the_smallest_row_that_is_not_lost():
    smallest = 127 / torch.finfo(torch.float32).max
    x = torch.tensor([[smallest * 1.01, -smallest / 2, 0.0]], dtype=torch.float32)
    payload, scales = encode(x, INT8_ROW)
    assert payload.tolist() == [[127, -63, 0]]
    assert torch.allclose(decode([payload, scales], INT8_ROW), x, rtol=0.01)


FLOATS = st.floats(width=32) | st.floats(-2.0, 2.0, width=32)
SHORT = [replace(form, block=form.block and 4) for form in NAMED + OWN]


@given(st.lists(FLOATS, min_size=16, max_size=16), st.sampled_from(SHORT))
@settings(deadline=None, max_examples=150)
def test_any_float32_row_has_the_bytes_of_the_definition(values, form):
    check(torch.tensor([values], dtype=torch.float32), form)


@pytest.mark.parametrize("form", NAMED + OWN, ids=by_name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_inputs_are_widened_and_left_as_they_were(form, dtype):
    x = torch.randn(7, 512, dtype=torch.float32).to(dtype)
    before = x.clone()
    check(x, form)
    assert torch.equal(x, before)
    planes = encode(x.t().contiguous().t().requires_grad_(), form)
    for plane, same in zip(planes, encode(x, form), strict=True):
        assert torch.equal(plane.view(torch.uint8), same.view(torch.uint8))
        assert plane.is_contiguous()


@pytest.mark.parametrize("form", NAMED, ids=by_name)
def test_rows_do_not_depend_on_their_neighbours(form):
    """Rows are worked on some at a time; the last ones are fewer."""
    x = torch.randn(101, 7168, dtype=torch.float32).bfloat16()
    planes = encode(x, form)
    decoded = decode(planes, form)
    for row in (0, 35, 36, 37, 100):
        alone = encode(x[row : row + 1], form)
        for plane, mine in zip(planes, alone, strict=True):
            assert torch.equal(plane[row].view(torch.uint8), mine[0].view(torch.uint8))
        assert torch.equal(decoded[row], decode(alone, form)[0])


@pytest.mark.parametrize("form", [BF16, *NAMED, *OWN], ids=by_name)
def test_no_token_gives_planes_without_rows(form):
    row = form.row(1024)
    planes = encode(torch.empty(0, 1024, dtype=torch.bfloat16), form)
    widths = [1024] if row.scale is None else [1024, row.num_scales]
    assert [tuple(plane.shape) for plane in planes] == [(0, width) for width in widths]
    assert planes[-1].dtype == (row.scale or row.element)
    assert decode(planes, form).shape == (0, 1024)


def test_a_row_without_columns_has_the_scale_0():
    payload, scales = encode(torch.empty(3, 0, dtype=torch.bfloat16), INT8_ROW)
    assert payload.shape == (3, 0)
    assert scales.tolist() == [[0.0]] * 3
    assert decode([payload, scales], INT8_ROW).shape == (3, 0)


def test_bf16_is_the_tensor_itself():
    x = every_bf16().view(256, 256)
    (plane,) = encode(x, BF16)
    assert plane is x
    bits = x.view(torch.int16).int() << 16
    assert torch.equal(decode([plane], BF16).view(torch.int32), bits)


@pytest.mark.parametrize(
    ("form", "hidden", "numbers"),
    [
        (FP8_BLOCK128, 200, ["200", "128", "256"]),
        (FP8_UE8M0, 640, ["640", "512"]),
        (FP8_ROUND_SCALE, 0, ["0", "128"]),
        (OWN[1], 33, ["33", "32"]),
    ],
)
def test_columns_that_do_not_divide_are_refused_with_numbers(form, hidden, numbers):
    with pytest.raises(ShapeError) as refused:
        encode(torch.zeros(2, hidden, dtype=torch.bfloat16), form)
    assert refused.value.argument == "hidden"
    assert all(text in str(refused.value) for text in [*numbers, form.name])


@pytest.mark.parametrize(
    ("form", "x", "words"),
    [
        (BF16, torch.zeros(2, 128, dtype=torch.float32), ["float32", "bfloat16"]),
        (FP8_BLOCK128, torch.zeros(2, 128, dtype=torch.int8), ["int8", "bfloat16 or float16"]),
        (FP8_BLOCK128, torch.zeros(2, 128, dtype=torch.float64), ["float64"]),
        (FP8_BLOCK128, torch.zeros(128, dtype=torch.bfloat16), ["(128,)", "num_tokens"]),
    ],
)
def test_what_cannot_be_encoded_is_refused(form, x, words):
    with pytest.raises(ShapeError) as refused:
        encode(x, form)
    assert all(word in str(refused.value) for word in words)


@pytest.mark.parametrize("form", NAMED + OWN, ids=by_name)
def test_decoding_is_one_product_of_what_byte_and_scale_stand_for(form):
    codes = torch.arange(256, dtype=torch.uint8).repeat(3, 4)
    row = form.row(1024)
    num_blocks = 1024 // (form.block or 1024)
    if form.rule is ScaleRule.UE8M0:
        scales = torch.randint(-(2**31), 2**31, (3, row.num_scales), dtype=torch.int32)
        power = exponents(scales, form, 4 * row.num_scales)[:, :num_blocks]
        factors = power_of_two(power).masked_fill(power == 128, math.nan)
    else:
        scales = torch.rand(3, row.num_scales, dtype=torch.float32)
        factors = scales.double()
    values = byte_values(form.element)[codes.long()].view(3, num_blocks, -1)
    want = (values * factors.unsqueeze(-1)).float().view(3, 1024)
    got = decode([codes.view(form.element), scales], form)
    assert got.dtype == torch.float32
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(1.5), want.nan_to_num(1.5))


def test_ue8m0_bytes_that_encode_never_writes_are_decoded_as_the_format_says():
    payload = torch.ones(1, 512, dtype=torch.float32).to(E4M3)
    scales = torch.tensor([[0x7FFE00FF]], dtype=torch.int32)  # bytes 255, 0, 254, 127
    got = decode([payload, scales], FP8_UE8M0)[0, ::128]
    assert got[0].isnan()
    assert got[1:].tolist() == [2.0**-127, 2.0**127, 1.0]


@pytest.mark.parametrize("form", NAMED, ids=by_name)
def test_slabs_with_column_major_scales_are_decoded(form):
    slabs, rows, hidden = 3, 10, 1024
    x = torch.randn(slabs * rows, hidden, dtype=torch.float32).bfloat16()
    payload, scales = encode(x, form)
    wide = torch.zeros(slabs, rows, 2 * hidden, dtype=torch.uint8)
    wide[:, :, :hidden] = payload.view(torch.uint8).view(slabs, rows, hidden)
    by_column = scales.view(slabs, rows, -1).transpose(1, 2).contiguous().transpose(1, 2)
    assert form is INT8_ROW or not by_column.is_contiguous()
    got = decode([wide.view(form.element)[:, :, :hidden], by_column], form)
    assert got.shape == (slabs, rows, hidden)
    assert torch.equal(got.view(-1, hidden), decode([payload, scales], form))


@pytest.mark.parametrize(
    ("form", "bound"),
    [(form, 1e-4 if form.element == INT8 else 9e-4) for form in NAMED + OWN[:1] + OWN[5:6]],
)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_what_is_decoded_is_close_to_what_was_encoded(form, bound, scale):
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(64, 1024, dtype=torch.float32, generator=generator) * scale).bfloat16()
    assert 0 < calc_diff(decode(encode(x, form), form), x) < bound
