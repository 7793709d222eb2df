"""Encoding inside kernels: the bytes of the codec, and logarithmic codes off by one at most.

On a machine with a GPU the kernels run there, otherwise Triton interprets them. It decides that
when it is imported, so they run in a process of their own; another one compiles them, which needs
no GPU either.
"""

from __future__ import annotations

import ast
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import crossdock
from crossdock import codec, logfmt
from crossdock.formats import FP8_BLOCK128, FP8_ROUND_SCALE, FP8_UE8M0, INT8_ROW, TokenFormat
from tests.unit.test_codec import E4M3, IN_POWERS, NAMED, OWN, by_name, every_bf16
from tests.unit.test_logfmt import calc_diff, distributions

HAS_GPU = torch.cuda.is_available()
CASTS = [False, True] if HAS_GPU and torch.cuda.get_device_capability() >= (8, 9) else [False]
FORMS = [*NAMED, *OWN, TokenFormat("e4m3 by 24", E4M3, NAMED[0].rule, block=24)]
SOURCE = Path(crossdock.__file__).parent / "ops" / "triton" / "quantize.py"

Run = Callable[..., Any]
"""Runs a function of `quantize_kernels`, by name, in another process."""


def release(package: str) -> tuple[int, ...]:
    """Major and minor version; () where it is not installed."""
    try:
        return tuple(int(number) for number in version(package).split(".")[:2])
    except PackageNotFoundError:
        return ()


def why_not_compiled() -> str:
    return "" if release("triton") else "Triton is not installed"


def why_not_run() -> str:
    """Why kernels can be run here neither on a GPU nor in the interpreter; empty if they can."""
    if HAS_GPU or not release("triton"):
        return why_not_compiled()
    if not release("numpy"):
        return "Triton interprets kernels with NumPy, which is not installed"
    if release("numpy") >= (2, 4) and release("triton") < (3, 7):
        return "Triton before 3.7 cannot interpret kernels with NumPy 2.4 or newer"
    return ""


def prepare(interpret: bool) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of infinities and NaN
    torch.set_num_threads(1)


def call(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    from tests.ops import quantize_kernels

    return getattr(quantize_kernels, name)(*args, **options)


@contextmanager
def process(*, interpret: bool) -> Iterator[Run]:
    context = get_context("spawn")
    with ProcessPoolExecutor(1, context, prepare, (interpret,)) as pool:

        def run(name: str, *args: Any, **options: Any) -> Any:
            return pool.submit(call, name, args, options).result(timeout=100)

        yield run


@pytest.fixture(scope="module")
def kernels() -> Iterator[Run]:
    if why_not_run():
        pytest.skip(why_not_run())
    with process(interpret=not HAS_GPU) as run:
        yield run


@pytest.fixture(scope="module")
def compiler() -> Iterator[Run]:
    if why_not_compiled():
        pytest.skip(why_not_compiled())
    with process(interpret=False) as run:
        yield run


def same_bytes(planes: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    pairs = zip(planes, others, strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def check(kernels: Run, x: torch.Tensor, form: TokenFormat, *, use_casts: bool) -> None:
    found = kernels("encode", x, form, use_casts=use_casts)
    assert same_bytes(found, codec.encode(x, form))


def fitted(x: torch.Tensor, form: TokenFormat) -> torch.Tensor:
    """As many of the columns as divide into blocks."""
    return x[:, : x.shape[1] // (form.block or 1) * (form.block or 1)]


def float32_rows(num_rows: int, hidden: int, *, seed: int) -> torch.Tensor:
    """Numbers of every size, in blocks of 8 that differ in size by 2**0 to 2**60."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, hidden // 8, 8, dtype=torch.float32, generator=generator)
    size = torch.randint(-149, 127, (num_rows, hidden // 8, 1), generator=generator)
    spread = torch.randint(0, 61, x.shape, generator=generator)
    return torch.ldexp(torch.ldexp(x, size // 2), size - size // 2 - spread).flatten(1)


@pytest.mark.parametrize("use_casts", CASTS)
@pytest.mark.parametrize("form", FORMS, ids=by_name)
@pytest.mark.parametrize("order", ["by exponent", "spread"])
def test_every_bf16_value_has_the_bytes_of_the_codec(kernels, order, form, use_casts):
    """Rows of few exponents, infinities and NaN among them, and rows that span all but those."""
    x = every_bf16().view(8, 8192)
    if order == "spread":
        finite = every_bf16()[every_bf16().isfinite()].view(-1, 128)
        x = torch.nn.functional.pad(finite.t().reshape(8, 8160), (0, 32))
    if not HAS_GPU:
        x = x.float()  # the interpreter widens subnormal bf16 to other numbers
    check(kernels, fitted(x, form), form, use_casts=use_casts)


@pytest.mark.parametrize("use_casts", CASTS)
@pytest.mark.parametrize("form", FORMS, ids=by_name)
def test_float32_numbers_of_every_size_have_the_bytes_of_the_codec(kernels, form, use_casts):
    x = float32_rows(5, 4096, seed=1)
    if not form.block:
        x[:4] = float32_rows(4, 8, seed=2).repeat(1, 512)
    check(kernels, fitted(x, form), form, use_casts=use_casts)


@pytest.mark.parametrize("use_casts", CASTS)
@pytest.mark.parametrize("form", FORMS, ids=by_name)
def test_one_infinity_or_nan_spoils_its_block(kernels, form, use_casts):
    x = float32_rows(6, 1536, seed=3)
    worst = torch.tensor([math.inf, -math.inf, math.nan, -math.nan], dtype=torch.float32)
    x[torch.arange(4), 70 * torch.arange(1, 5)] = worst
    x[4, 5], x[4, 6] = math.inf, math.nan
    x.view(torch.int32)[5, 9] = 0x7F800001  # a NaN with other bits
    check(kernels, x, form, use_casts=use_casts)


@pytest.mark.parametrize("use_casts", CASTS)
@pytest.mark.parametrize("form", FORMS, ids=by_name)
def test_zeros_and_what_is_too_small_for_a_factor(kernels, form, use_casts):
    x = torch.zeros(8, 1536, dtype=torch.float32)
    x[1] = -0.0
    x[2, ::3], x[2, 1::3] = 2.0**-126, -(2.0**-126)
    x[3, ::2] = -(2.0**-149)
    x[4], x[5] = 2.0**-122, form.limit / torch.finfo(torch.float32).max
    x[6, :], x[7, :] = form.min_amax, form.limit
    check(kernels, x, form, use_casts=use_casts)


@pytest.mark.parametrize("use_casts", CASTS)
@pytest.mark.parametrize("form", FORMS, ids=by_name)
def test_products_next_to_the_limit_and_scales_next_to_a_power_of_two(kernels, form, use_casts):
    """Largest magnitudes for some of which `x * (limit / amax)` comes out above the limit."""
    width = form.block or 4
    largest = 1 + torch.arange(8 * 96, dtype=torch.float32) / (8 * 96)
    boundary = form.limit * 2.0 ** torch.arange(-12, 84, dtype=torch.float32)
    for row, towards in enumerate([-math.inf, math.inf]):
        largest[row * 96 :][:96] = boundary.nextafter(torch.tensor(towards))
    x = torch.zeros(8 * 96, width, dtype=torch.float32)
    x[:, 0], x[:, width // 2] = largest, -largest
    if form.block:
        x = x.view(8, -1)
    else:
        x = x[:192:3] if form.rule in IN_POWERS else x[::11]
        factor = torch.full_like(x[:, 0], form.limit) / x[:, 0]
        assert form.rule in IN_POWERS or (x[:, 0] * factor > form.limit).any()
    check(kernels, x, form, use_casts=use_casts)


@pytest.mark.parametrize("use_casts", CASTS)
@pytest.mark.parametrize(
    ("form", "hidden", "dtype"),
    [
        (FP8_BLOCK128, 7168, torch.bfloat16),
        (FP8_BLOCK128, 128, torch.float32),
        (FP8_ROUND_SCALE, 384, torch.float16),
        (FP8_UE8M0, 2560, torch.bfloat16),
        (FP8_UE8M0, 512, torch.float16),
        (INT8_ROW, 7168, torch.bfloat16),
        (INT8_ROW, 1, torch.float32),
        (INT8_ROW, 100, torch.float16),
    ],
)
def test_widths_that_are_no_power_of_two(kernels, form, hidden, dtype, use_casts):
    generator = torch.Generator().manual_seed(hidden)
    x = torch.randn(5, hidden, dtype=torch.float32, generator=generator).to(dtype)
    check(kernels, x, form, use_casts=use_casts)


FLOATS = st.floats(width=32) | st.floats(-2.0, 2.0, width=32)
SHORT = [replace(form, block=form.block and 4) for form in NAMED + OWN]


@given(st.lists(FLOATS, min_size=16, max_size=16), st.sampled_from(SHORT))
@settings(deadline=None, max_examples=100)
def test_any_float32_row_has_the_bytes_of_the_codec(kernels, values, form):
    x = torch.tensor([values], dtype=torch.float32)
    check(kernels, x, form, use_casts=CASTS[-1])


@pytest.mark.parametrize("num_blocks", [1, 4, 64])
def test_packed_exponents_are_bytes_in_order(kernels, num_blocks):
    exponents = torch.arange(num_blocks, dtype=torch.int32) * 83 % 256
    got = kernels("pack", exponents).view(torch.uint8)
    assert got[:num_blocks].tolist() == exponents.tolist()
    assert not got[num_blocks:].any()


def test_a_wrong_byte_is_seen(kernels):
    x = float32_rows(2, 256, seed=4)
    codes, scales = kernels("encode", x, FP8_BLOCK128)
    assert same_bytes([codes, scales], codec.encode(x, FP8_BLOCK128))
    swapped = scales.flip(1)
    codes[1, 255] ^= 1
    assert not same_bytes([codes, scales], codec.encode(x, FP8_BLOCK128))
    codes[1, 255] ^= 1
    assert not same_bytes([codes, swapped], codec.encode(x, FP8_BLOCK128))


def words_of(packed: torch.Tensor, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and signs [T, H] of packed rows."""
    groups = packed.shape[1] // 5
    low, high = packed[:, : 4 * groups].int(), packed[:, 4 * groups :].int()
    pairs = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], 1)
    words = low + 256 * pairs
    assert not words[:, hidden:].any(), "columns beyond H are not zeros"
    return words[:, :hidden] & 511, words[:, :hidden] >> 9


def check_log(found: list[torch.Tensor], x: torch.Tensor) -> None:
    """Codes are off by one at most from those of the torch twin, signs and zeros not at all."""
    hidden, (packed, ranges) = x.shape[1], logfmt.encode_log(x)
    assert torch.allclose(found[1], ranges, rtol=1e-6, atol=1e-6, equal_nan=True)
    code, sign = words_of(found[0], hidden)
    want, want_sign = words_of(packed, hidden)
    assert torch.equal(sign, want_sign)
    assert (code - want).abs().max() <= 1
    assert not code[x == 0].any()


def check_decoded(got: torch.Tensor, x: torch.Tensor) -> None:
    """Signs are kept; what is not zero is off by half a step, at most 2.2 %."""
    assert torch.equal(got.signbit(), x.signbit())
    for begin in range(0, x.shape[1], 64):
        block, found = x[:, begin : begin + 64].double(), got[:, begin : begin + 64].double()
        largest = block.abs().amax(1, keepdim=True)
        is_kept = block.abs() > largest * 2.0**-32
        assert torch.allclose(found[is_kept], block[is_kept], rtol=0.022, atol=2.0**-149)
        assert (found.abs() <= largest * 2.0**-31.9)[~is_kept].all()


def check_both_ways(kernels: Run, x: torch.Tensor) -> torch.Tensor:
    """The decoded rows."""
    found = kernels("encode_log", x)
    check_log(found, x.float())
    twin = logfmt.decode_log(found, x.shape[1])
    got, other = (kernels("decode_log", found, x.shape[1], flat=flat) for flat in (False, True))
    check_decoded(got, x.float())
    assert torch.allclose(got, twin, rtol=2e-5, atol=2.0**-149)
    assert torch.allclose(other, twin, rtol=2e-5, atol=2.0**-149)
    return got


@pytest.mark.parametrize("name", distributions())
def test_logarithmic_rows_are_those_of_the_twin(kernels, name):
    x = distributions()[name][:8]
    assert abs(calc_diff(check_both_ways(kernels, x), x)) < 1e-3


def test_few_codes_differ_from_those_of_the_twin(kernels):
    """Without the terms that move boundaries off the middle of logarithms one in 200 would."""
    x = distributions()["60 powers of two"][:16]
    code, _ = words_of(kernels("encode_log", x)[0], 1000)
    assert (code != words_of(logfmt.encode_log(x)[0], 1000)[0]).sum() <= 16000 / 2000


@pytest.mark.parametrize("hidden", [1, 3, 4, 5, 63, 64, 65, 130, 7168])
def test_logarithmic_rows_of_any_width(kernels, hidden):
    generator = torch.Generator().manual_seed(hidden)
    x = torch.randn(3, hidden, dtype=torch.float32, generator=generator).bfloat16()
    x[1, ::3] = -0.0
    check_both_ways(kernels, x)


def test_logarithms_of_the_smallest_and_the_largest_numbers(kernels):
    x = torch.zeros(8, 128, dtype=torch.float32)
    largest = torch.finfo(torch.float32).max
    x[1], x[1, ::2] = largest, -largest
    x[2, 5], x[2, 7] = 2.0**-149, -3 * 2.0**-149
    x[3] = 2.0 ** torch.arange(-148, -20, dtype=torch.float32)
    x[4] = 2.0 ** torch.arange(0, 128, dtype=torch.float32)
    x[5, :64], x[5, 64:] = 2.0**-126, -(2.0**-127)
    x[6] = 1 + torch.arange(128) * 2.0**-23
    x[7] = float32_rows(1, 128, seed=5)
    check_both_ways(kernels, x)


@pytest.mark.parametrize("worst", [math.inf, -math.inf, math.nan])
def test_logarithmic_blocks_with_an_infinity_or_a_nan(kernels, worst):
    x = distributions()["heavy tails"][:2, :192].contiguous()
    x[1, 64:128:2] = torch.tensor([0.0, -0.0] * 16, dtype=torch.float32)
    x[1, 65], x[1, 67] = worst, 2.0**-149
    packed, ranges = kernels("encode_log", x)
    assert words_of(packed, 192)[0][1, 64:128].tolist() == [0, 511] * 32
    for flat in (False, True):
        got = kernels("decode_log", [packed, ranges], 192, flat=flat)
        assert torch.equal(got[1, 64:128].isnan(), x[1, 64:128] != 0)
        assert torch.equal(got.signbit()[1, 64:128:2], x.signbit()[1, 64:128:2])
        assert not got[0].isnan().any()
        check_decoded(got[1:, :64], x[1:, :64])
        check_decoded(got[1:, 128:], x[1:, 128:])


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=66))
@settings(deadline=None, max_examples=50)
def test_any_logarithmic_row_keeps_signs_and_is_off_by_at_most_half_a_step(kernels, values):
    x = torch.tensor([values + [0.0] * (66 - len(values))], dtype=torch.float32)
    found = kernels("encode_log", x)
    check_log(found, x)
    check_decoded(kernels("decode_log", found, 66), x)


def test_a_logarithmic_code_off_by_two_is_seen(kernels):
    x = distributions()["normal"][:2]
    packed, ranges = kernels("encode_log", x)
    packed[0, 70] += 2 if packed[0, 70] < 128 else -2
    with pytest.raises(AssertionError):
        check_log([packed, ranges], x)


def example_of(name: str) -> dict[str, Any]:
    """The values of the worked example in a function's docstring."""
    body = ast.parse(SOURCE.read_text("utf-8")).body
    (function,) = (node for node in body if getattr(node, "name", "") == name)
    text = ast.get_docstring(function).partition("\nExample")[2]
    return {name: ast.literal_eval(value) for name, value in re.findall(r"(\w+)=(\[[^=]*\])", text)}


def test_worked_example_of_a_row(kernels):
    example = example_of("encode_row")
    form = TokenFormat("example", E4M3, FP8_BLOCK128.rule, block=4, min_amax=0.5)
    x = torch.tensor(example["values"], dtype=torch.float32).view(1, -1)
    codes, scales = kernels("encode", x, form)
    assert codes.view(2, 4).tolist() == example["codes"]
    assert scales[0].tolist() == example["scales"]


def test_worked_example_of_packed_exponents(kernels):
    example = example_of("pack_exponents")
    exponents = torch.tensor(example["exponents"], dtype=torch.int32)
    assert kernels("pack", exponents).tolist() == example["words"]


def test_worked_examples_of_logarithmic_rows(kernels):
    example = example_of("encode_log")
    assert example_of("load_log") == example
    x = torch.tensor([example["values"]], dtype=torch.float32)
    planes = kernels("encode_log", x)
    assert planes[0][0].tolist() == example["low"] + example["high"]
    assert planes[1][0].tolist() == pytest.approx(example["ranges"], rel=1e-5)
    assert torch.allclose(kernels("decode_log", planes, 4), x, rtol=1e-6)


@pytest.mark.parametrize(
    ("capability", "form", "use_casts"),
    [
        (80, FP8_BLOCK128, False),
        (80, INT8_ROW, False),
        (90, FP8_BLOCK128, False),
        (90, FP8_BLOCK128, True),
        (100, FP8_UE8M0, True),
        (100, INT8_ROW, False),
    ],
)
def test_encoding_compiles_to_exact_operations(compiler, capability, form, use_casts):
    code = compiler("compile_tokens", capability, form, 7168, use_casts=use_casts)
    assert not re.search(r"fma\.|\.ftz|\.approx|div\.full", code["ptx"])
    assert "div.rn.f32" in code["ptx"]
    assert use_casts == ("cvt.rn.satfinite.e4m3x2.f32" in code["ptx"])
    assert re.search(r"ld\.global\S*\.v4\.b32", code["ptx"])
    assert re.search(r"st\.global\S*\.v4\.b32", code["ptx"])
    assert is_without_spills(code["usage"])


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_logarithmic_rows_compile_without_spills(compiler, capability):
    found = [
        compiler("compile_log_encoding", capability, 7168),
        compiler("compile_log_decoding", capability, 7168, flat=False),
    ]
    if capability == 90:
        found.append(compiler("compile_log_encoding", capability, 5))
        found.append(compiler("compile_log_decoding", capability, 7168, flat=True))
    assert all(is_without_spills(code["usage"]) for code in found)


def is_without_spills(usage: str) -> bool:
    """Registers that do not suffice are kept on the stack."""
    return "STACK:0 " in usage and "LOCAL:0" in usage


@pytest.mark.parametrize("usage", ["REG:255 STACK:8 SHARED:0 LOCAL:0", "REG:9 STACK:0 LOCAL:16"])
def test_spills_are_seen(usage):
    assert not is_without_spills(usage)
