"""The helpers of `deep_ep.utils`, each against its definition."""

from __future__ import annotations

import time

import pytest
import torch

from deep_ep.utils.math import (
    align,
    calc_diff,
    inplace_unique,
    per_token_cast_back,
    per_token_cast_to_fp8,
)
from deep_ep.utils.testing import bench


@pytest.mark.parametrize(("size", "aligned"), [(0, 0), (1, 128), (128, 128), (129, 256)])
def test_align(size: int, aligned: int) -> None:
    assert align(size, 128) == aligned


def test_calc_diff_of_known_tensors() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    assert calc_diff(a, a) == 0.0
    assert calc_diff(a, b) == pytest.approx(1 - 2 / 3)
    assert calc_diff(b, -b) == pytest.approx(2.0)
    assert calc_diff(torch.zeros(3), torch.zeros(3)) == 0.0
    assert calc_diff(a, torch.tensor([float("nan"), 0.0])) != 0.0


def random_rows(num_rows: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width)
    return torch.randn((num_rows, width), generator=generator, dtype=torch.float32).bfloat16()


@pytest.mark.parametrize("width", [128, 512, 300, 7])
def test_fp8_there_and_back(width: int) -> None:
    x = random_rows(9, width)
    quantised, scales = per_token_cast_to_fp8(x)
    assert (quantised.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert (quantised.shape, scales.shape) == (x.shape, (9, align(width, 128) // 128))
    assert quantised.is_contiguous()
    back = per_token_cast_back(quantised, scales)
    assert back.dtype == torch.bfloat16
    # e4m3 has three bits of fraction: half a unit in the last place is 1/16 of a value, or half of
    # the smallest subnormal (2 ** -9) times the scale; bf16 adds 1/256.
    error = (back.double() - x.double()).abs()
    smallest = scales.double().repeat_interleave(128, dim=1)[:, :width] / 1024
    assert bool((error <= x.double().abs() * (1 / 16 + 1 / 128) + smallest).all())


def test_fp8_scale_is_the_largest_value_over_448() -> None:
    x = torch.zeros((2, 256), dtype=torch.bfloat16)
    x[0, 3], x[0, 200] = -7.0, 896.0
    quantised, scales = per_token_cast_to_fp8(x)
    amax = torch.tensor([[7.0, 896.0], [1e-4, 1e-4]], dtype=torch.float32)
    assert torch.equal(scales, amax / 448)
    assert quantised[0, 3].float() == -448
    assert quantised[0, 200].float() == 448


@pytest.mark.parametrize("num_rows", [0, 1])
def test_fp8_of_few_rows(num_rows: int) -> None:
    x = random_rows(num_rows, 256)
    assert per_token_cast_back(*per_token_cast_to_fp8(x)).shape == x.shape


def test_packed_scales_are_powers_of_two_in_any_layout() -> None:
    exponents = torch.arange(100, 116, dtype=torch.uint8).view(2, 8)
    packed = exponents.view(torch.int32)
    ones = torch.ones((2, 1024), dtype=torch.float32).to(torch.float8_e4m3fn)
    expected = torch.exp2(exponents.float() - 127).bfloat16()
    for scales in (packed, packed.t().contiguous().t()):
        assert torch.equal(per_token_cast_back(ones, scales)[:, ::128], expected)


def test_inplace_unique_keeps_each_value_once() -> None:
    x = torch.tensor([[3, 1, 3, -1], [0, 0, 0, 2], [-1, -1, -1, -1]])
    inplace_unique(x, 4)
    assert x.tolist() == [[3, 1, -1, -1], [2, 0, -1, -1], [-1, -1, -1, -1]]


def test_inplace_unique_with_fewer_values_than_columns() -> None:
    x = torch.tensor([[1, 0, 1, 0, 1]])
    inplace_unique(x, 2)
    assert x.tolist() == [[1, 0, -1, -1, -1]]


def test_bench_times_calls_and_nothing_else() -> None:
    calls, afters = [], []

    def after() -> None:
        time.sleep(0.05)
        afters.append(1)

    mean, smallest, largest = bench(
        lambda: calls.append(time.sleep(0.002)), num_warmups=2, num_tests=3, post_fn=after
    )
    assert (len(calls), len(afters)) == (5, 3)
    assert 0.002 <= smallest <= mean <= largest
    assert smallest < 0.05
