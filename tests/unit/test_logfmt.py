"""The logarithmic format: its bits read one by one, its levels in float64, its error bounded."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdock.formats import RowFormat
from crossdock.logfmt import decode_log, encode_log, log_row

ROUNDING = 1.00002
"""What float32 logarithms and powers may add to a magnitude, as a factor."""


def calc_diff(a: torch.Tensor, b: torch.Tensor) -> float:
    """1 - 2 sum(ab) / sum(aa + bb) in float64."""
    a, b = a.double(), b.double()
    return float(1 - 2 * (a * b).sum() / (a * a + b * b).sum())


def round_trip(x: torch.Tensor) -> torch.Tensor:
    return decode_log(encode_log(x), x.shape[1])


def read_row(packed: list[int], num_values: int) -> list[tuple[int, int]]:
    """(sign, code) of every value of a row, bit by bit."""
    quarter = len(packed) // 5
    words = []
    for value in range(num_values):
        high = packed[4 * quarter + value % quarter]
        ninth, sign = (high >> (value // quarter * 2 + bit) & 1 for bit in (0, 1))
        words.append((sign, packed[value] + 256 * ninth))
    return words


def levels(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [T, H] of `x`, and the step [T, H] of the block that each lies in."""
    packed, ranges = encode_log(x)
    codes = [[code for _, code in read_row(row, x.shape[1])] for row in packed.tolist()]
    steps = ranges[:, 1::2].repeat_interleave(64, 1)[:, : x.shape[1]]
    return torch.tensor(codes, dtype=torch.int64), steps


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, dtype=torch.float32, generator=generator)


@pytest.mark.parametrize(
    ("hidden", "bytes_", "ranges"),
    [(0, 0, 0), (1, 5, 2), (4, 5, 2), (5, 10, 2), (64, 80, 2), (65, 85, 4), (7168, 8960, 224)],
)
def test_a_row_is_five_bytes_for_four_columns_and_two_numbers_for_64(hidden, bytes_, ranges):
    row = log_row(hidden)
    assert row == RowFormat(torch.uint8, bytes_, torch.float32, ranges, encoding="logfmt")
    packed, found = encode_log(torch.zeros(3, hidden, dtype=torch.bfloat16))
    assert packed.shape == (3, bytes_)
    assert found.shape == (3, ranges)
    assert (packed.dtype, found.dtype) == (torch.uint8, torch.float32)


@pytest.mark.parametrize("hidden", [1, 3, 4, 5, 62, 63, 64, 65, 66, 127, 130, 200])
def test_bits_read_one_by_one_give_the_decoded_values(hidden):
    x = normal(5, hidden)
    x[1, ::3] = 0.0
    x[3] *= torch.arange(hidden).sub(hidden // 2).div(4).exp2()
    packed, ranges = encode_log(x)
    got = decode_log([packed, ranges], hidden)
    num_padded = -(-hidden // 4) * 4
    for row in range(5):
        words = read_row(packed[row].tolist(), num_padded)
        assert all(word == (0, 0) for word in words[hidden:])
        for column, (sign, code) in enumerate(words[:hidden]):
            top, step = ranges[row, column // 64 * 2 :][:2].tolist()
            magnitude = 2.0 ** (top - (511 - code) * step) if code else 0.0
            assert sign == x[row, column].signbit()
            assert got[row, column] == pytest.approx((1 - 2 * sign) * magnitude, rel=2e-5)


def test_every_word_of_ten_bits_is_decoded():
    words = torch.randperm(1024, generator=torch.Generator().manual_seed(2))
    low, high = words & 255, (words >> 8).view(4, 256)
    high = high[0] + 4 * high[1] + 16 * high[2] + 64 * high[3]
    packed = torch.cat([low, high]).to(torch.uint8).view(1, -1)
    top, step = 3.0, 1 / 32
    ranges = torch.tensor([top, step] * 16, dtype=torch.float32).view(1, -1)
    code = words & 511
    want = 2.0 ** (top - (511 - code.double()) * step)
    want = torch.where(code > 0, want, 0.0) * torch.where(words >= 512, -1.0, 1.0)
    got = decode_log([packed, ranges], 1024)
    assert torch.allclose(got[0].double(), want, rtol=2e-5, atol=0.0)
    assert torch.equal(got[0].signbit(), words >= 512)


def distributions() -> dict[str, torch.Tensor]:
    x = normal(64, 1000)
    sparse = torch.zeros_like(x)
    sparse[:, ::64] = x[:, ::64]
    return {
        "normal": x,
        "half zeros": x.relu(),
        "uniform": torch.rand(64, 1000, dtype=torch.float32) - 0.5,
        "heavy tails": x * (normal(64, 1000, seed=1) * 3).exp(),
        "60 powers of two": x * (normal(64, 1000, seed=1) * 10).exp2(),
        "rows of any size": x * (normal(64, 1, seed=1) * 25).exp2(),
        "constant blocks": normal(64, 16).repeat_interleave(64, 1)[:, :1000],
        "nearly constant": 1 + x / 1e4,
        "one in a block": sparse,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", distributions())
def test_the_error_is_within_the_bound_of_the_format(name, dtype):
    x = distributions()[name].to(dtype)
    assert abs(calc_diff(round_trip(x), x)) < 1e-3


@pytest.mark.parametrize("name", distributions())
def test_no_value_is_off_by_more_than_half_a_step(name):
    x = distributions()[name]
    codes, steps = levels(x)
    got = round_trip(x)
    kept = codes > 0
    assert torch.equal(got != 0, kept)
    upper = steps[kept].double().exp2()  # the next level and the middle, of a level of 1
    middle = (1 + upper) / 2
    ratio = got[kept].double() / x[kept].double()
    assert (ratio < upper / middle * ROUNDING).all()
    assert (ratio > 1 / middle / ROUNDING).all()


def test_the_boundary_is_halfway_between_values_not_between_logarithms():
    """A block of 32 powers of two, where the two differ most: by 0.3 % of a step's ratio."""
    step = 32 / 510
    codes = torch.arange(10, 511, 8)[:62]
    lower = 2.0 ** ((codes - 511).double() * step)
    upper = 2.0 ** ((codes - 510).double() * step)
    ends = torch.tensor([1.0, 2.0**-32], dtype=torch.float64)
    for share, want in ((0.4985, codes), (0.5015, codes + 1)):
        x = torch.cat([lower + (upper - lower) * share, ends]).float().view(1, -1)
        found, steps = levels(x)
        assert steps[0, 0] == pytest.approx(step)
        assert torch.equal(found[0, :62], want)
        assert found[0, 62:].tolist() == [511, 1]
    assert ((lower * upper).sqrt() < lower + (upper - lower) * 0.4985).all()


def test_equal_magnitudes_are_exact_in_bf16():
    """Every magnitude of bf16 fills a block, with both signs and zeros; subnormal ones, too."""
    magnitudes = torch.arange(1, 0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    pattern = torch.tensor([1.0, -1.0, 0.0, 1.0] * 16, dtype=torch.bfloat16)
    x = (magnitudes.unsqueeze(-1) * pattern).view(-1, 127 * 64)
    got = round_trip(x)
    assert torch.equal(got.bfloat16().view(torch.int16), x.view(torch.int16))
    assert torch.allclose(got, x.float(), rtol=1e-5, atol=0.0)


def test_nearly_equal_magnitudes_are_nearly_exact():
    x = 3 + normal(8, 64).clamp(-3, 3) / 1e4
    got = round_trip(x)
    assert (encode_log(x)[1][:, 1] == 2.0**-14).all()
    assert torch.allclose(got, x, rtol=2.0**-15, atol=0.0)


def test_zeros_do_not_widen_the_range():
    x = normal(8, 64)
    x[:, 32:] = 1.0
    without = encode_log(x)
    x[:, 33:] = 0.0
    planes = encode_log(x)
    assert torch.equal(planes[1], without[1])
    assert torch.equal(decode_log(planes, 64)[:, :33], decode_log(without, 64)[:, :33])


def test_zeros_keep_their_sign_and_have_no_range():
    x = torch.tensor([[0.0, -0.0, -0.0] * 30], dtype=torch.bfloat16)
    packed, ranges = encode_log(x)
    assert not ranges.any()
    got = decode_log([packed, ranges], 90)
    assert not got.any()
    assert torch.equal(got.signbit(), x.signbit())


def test_what_lies_32_powers_of_two_below_the_largest_becomes_zero():
    kept, lost = [2.0**-30, -(2.0**-31.9), 2.0**-32], [2.0**-32.2, -(2.0**-33), 2.0**-126, 1e-45]
    x = torch.tensor([[-1.0, *kept, *lost, 0.0]], dtype=torch.float32) * 2**20
    got = round_trip(x)[0] / 2**20
    assert got[:4].tolist() == pytest.approx([-1.0, *kept], rel=0.022)
    assert not got[4:].any()
    assert torch.equal(got.signbit(), x[0].signbit())


def test_the_smallest_magnitudes_of_float32_are_no_zeros():
    smallest = 2.0**-149
    x = torch.tensor([[smallest, 0.0, -3 * smallest, 2.0**-126]], dtype=torch.float32)
    got = round_trip(x)
    assert torch.allclose(got, x, rtol=0.03, atol=0.0)
    assert got[0, 1] == 0.0


def test_the_largest_magnitudes_of_float32_stay_finite():
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([[largest, -largest, 1.0, 0.0]], dtype=torch.float32)
    assert round_trip(x[:, :2])[0].tolist() == pytest.approx([largest, -largest], rel=1e-5)
    assert round_trip(x)[0].tolist() == pytest.approx([largest, -largest, 0.0, 0.0], rel=1e-5)


@pytest.mark.parametrize("worst", [math.inf, -math.inf, math.nan, -math.nan])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_infinity_or_a_nan_makes_what_is_not_zero_in_its_block_nan(worst, dtype):
    x = normal(3, 200).to(dtype)
    x[1, 64:128:2] = torch.tensor([0.0, -0.0] * 16, dtype=dtype)
    x[1, 67] = 1e-30
    calm = round_trip(x)
    x[1, 65] = worst
    packed, ranges = encode_log(x)
    got = decode_log([packed, ranges], 200)
    assert ranges[1].view(torch.int32)[2:4].tolist() == [0x7FC00000] * 2
    assert torch.equal(got[1, 64:128].isnan(), x[1, 64:128] != 0)
    assert torch.equal(got.signbit()[1, 64:128:2], x.signbit()[1, 64:128:2])
    got[1, 64:128] = calm[1, 64:128]
    assert torch.equal(got, calm)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=130))
@settings(deadline=None, max_examples=100)
def test_any_row_keeps_signs_and_is_off_by_at_most_half_a_step(values):
    x = torch.tensor([values], dtype=torch.float32).view(1, -1)
    got = round_trip(x)
    assert torch.equal(got.signbit(), x.signbit())
    for begin in range(0, len(values), 64):
        block, found = x[0, begin : begin + 64].double(), got[0, begin : begin + 64].double()
        largest = block.abs().max()
        kept = block.abs() > largest * 2.0**-32
        assert torch.allclose(found[kept], block[kept], rtol=0.022, atol=2.0**-149)
        assert (found[~kept].abs() <= largest * 2.0**-31.9).all()


def test_inputs_are_left_as_they_were_and_need_not_be_contiguous():
    x = normal(8, 100).bfloat16()
    before = x.clone()
    planes = encode_log(x)
    assert torch.equal(x, before)
    assert all(plane.is_contiguous() for plane in planes)
    for same in (x.t().contiguous().t().requires_grad_(), x.float(), x.float().requires_grad_()):
        for plane, other in zip(planes, encode_log(same), strict=True):
            assert torch.equal(plane, other)
    half = normal(8, 100).half()
    assert torch.equal(encode_log(half)[0], encode_log(half.float())[0])


@pytest.mark.parametrize("hidden", [0, 1, 64, 100])
def test_no_row_gives_planes_without_rows(hidden):
    planes = encode_log(torch.empty(0, hidden, dtype=torch.bfloat16))
    row = log_row(hidden)
    assert [tuple(plane.shape) for plane in planes] == [(0, row.hidden), (0, row.num_scales)]
    assert decode_log(planes, hidden).shape == (0, hidden)


def test_a_row_without_columns_is_decoded():
    assert round_trip(torch.empty(3, 0, dtype=torch.bfloat16)).shape == (3, 0)


def test_rows_do_not_depend_on_their_neighbours():
    """Rows are worked on some at a time; the last ones are fewer."""
    x = normal(50, 7168).bfloat16()
    planes = encode_log(x)
    decoded = decode_log(planes, 7168)
    for row in (0, 17, 18, 49):
        alone = encode_log(x[row : row + 1])
        for plane, mine in zip(planes, alone, strict=True):
            assert torch.equal(plane[row], mine[0])
        assert torch.equal(decoded[row], decode_log(alone, 7168)[0])
