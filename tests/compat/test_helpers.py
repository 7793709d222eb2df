"""The helpers of `deep_ep.utils`, each against its definition."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

from deep_ep.utils.math import (
    align,
    calc_diff,
    hash_tensor,
    inplace_unique,
    per_token_cast_back,
    per_token_cast_to_fp8,
)
from deep_ep.utils.testing import bench, bench_kineto


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


def test_packed_scales_of_slabs_in_the_shape_of_unpacked_ones() -> None:
    """DeepEP's low-latency test views `[L, rows, H / 512]` words as `[-1, H / 128]`."""
    exponents = torch.arange(100, 124, dtype=torch.uint8).view(2, 3, 4)
    packed = exponents.view(torch.int32).transpose(1, 2).contiguous().transpose(1, 2)
    ones = torch.ones((6, 512), dtype=torch.float32).to(torch.float8_e4m3fn)
    expected = torch.exp2(exponents.float() - 127).bfloat16().view(6, 4)
    whole = per_token_cast_back(ones[:4], packed.contiguous().view(-1)[:4].view(1, 4))
    assert torch.equal(whole[:, ::128], expected[:4])
    for slab, wanted in zip(packed, expected.view(2, 3, 4), strict=True):
        for count in range(4):
            rows = per_token_cast_back(ones[:count], slab[:count])
            assert torch.equal(rows[:, ::128], wanted[:count])


def test_hash_is_the_sum_of_int32_words() -> None:
    words = torch.tensor([[1, -2], [2**31 - 1, 7]], dtype=torch.int32)
    assert hash_tensor(words) == 2**31 + 5
    assert hash_tensor(words.view(torch.bfloat16)) == hash_tensor(words.view(torch.int8))
    assert hash_tensor(words.t()) == hash_tensor(words.flip(0)) == hash_tensor(words)
    assert hash_tensor(words[:1]) == hash_tensor(words[:1, :1]) - 2 == -1
    assert hash_tensor(words[:0]) == 0


@pytest.mark.parametrize("num_bytes", [1, 2, 3])
def test_hash_of_bytes_that_fill_no_word(num_bytes: int) -> None:
    assert hash_tensor(torch.full((num_bytes,), 1, dtype=torch.uint8)) == 0x010101 % 256**num_bytes


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


def multiply_small_and_large() -> None:
    for size in (4, 256):
        x = torch.ones((size, size), dtype=torch.float32)
        torch.mm(x, x)


def test_bench_kineto_times_operators_by_name(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    means, ones = bench_kineto(
        multiply_small_and_large,
        ("aten::mm", "aten::ones"),
        num_tests=5,
        suppress_kineto_output=True,
        trace_path=str(trace),
        num_kernels_per_period=2,
    )
    assert 0 < means[0] < means[1] < 1
    assert len(ones) == 2
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("aten::mm") == 10


def test_bench_kineto_of_one_name_is_a_number() -> None:
    x = torch.ones((4, 4), dtype=torch.float32)
    mean = bench_kineto(
        lambda: torch.mm(x, x),
        "aten::mm",
        num_tests=3,
        suppress_kineto_output=True,
        barrier_comm_profiling=True,
    )
    assert 0 < mean < 1


def test_bench_kineto_says_what_it_did_not_find(capfd: pytest.CaptureFixture[str]) -> None:
    """No kernel is called dispatch here; and what was printed meanwhile is dropped."""
    with pytest.raises(ValueError, match="'dispatch' ran 0 times, expected 2 calls"):
        bench_kineto(lambda: os.write(1, b"x"), "dispatch", 2, suppress_kineto_output=True)
    os.write(1, b"y")
    assert capfd.readouterr() == ("xy", "")  # the call that warms up is not profiled
