"""The oracle of the low-latency calls: its bytes against torch's casts, its layouts by hand."""

from __future__ import annotations

import math

import pytest
import torch

from crossdock import reference_low_latency as oracle
from crossdock.reference import calc_diff

FP8 = torch.float8_e4m3fn
FP8_FORMATS = ("fp8", "fp8_round_scale", "fp8_ue8m0")

BAD = [(0x7F80, math.inf), (0xFF80, math.inf), (0x7FC0, math.nan), (0xFFA5, math.nan)]
"""Bits of bf16 values that cannot be encoded, and the scale that comes of it."""

# Rank 0 owns experts 0 and 1, rank 1 owns 2 and 3: the world of the docstrings.
TOPK_IDXS = [torch.tensor([[0, 2], [1, -1], [3, 3]]), torch.tensor([[2, 0]])]
XS = [torch.tensor([[10], [20], [30]]).bfloat16(), torch.tensor([[40]]).bfloat16()]
WEIGHTS = [torch.tensor([[0.5, 0.25], [1, 9], [0.5, 0.25]]), torch.tensor([[1.0, 2.0]])]
ROWS = [
    [torch.tensor([[10.0], [40.0]]), torch.tensor([[20.0]])],
    [torch.tensor([[10.0], [40.0]]), torch.tensor([[30.0]])],
]


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def row(values, width=128):
    """One token: these values, then zeros."""
    return torch.tensor([[*values, *[0.0] * (width - len(values))]]).bfloat16()


def bf16_values(first, last):
    """Every bf16 value whose bits are in the range, with either sign."""
    codes = torch.arange(first, last + 1, dtype=torch.int32)
    return torch.cat([codes, codes - 2**15]).to(torch.int16).view(torch.bfloat16)


def blocks_of_every_size(step=5):
    """Tokens `[T, 512]` whose blocks have every `step`-th finite bf16 value as largest one."""
    generator = torch.Generator().manual_seed(3)
    sizes = bf16_values(0, 0x7F7F)[: 0x7F80 // step * step : step]
    sizes = sizes[: len(sizes) // 4 * 4].unsqueeze(1)
    spread = 2 * torch.rand((len(sizes), 127), generator=generator) - 1
    return torch.cat([sizes, (sizes * spread).bfloat16()], dim=1).reshape(-1, 512)


def quotients(x):
    """amax / 448 and 448 / amax as float32 gives them, both operands tensors."""
    amax = x.float().unflatten(1, (-1, 128)).abs().amax(dim=2).clamp(min=1e-4)
    return amax / torch.full_like(amax, 448), torch.full_like(amax, 448) / amax


def power_at_least(value):
    mantissa, exponent = math.frexp(value)
    return math.ldexp(1, exponent - (mantissa == 0.5))


@pytest.mark.parametrize("form", FP8_FORMATS)
def test_every_bf16_value_is_rounded_as_torch_rounds_it(form):
    values = bf16_values(0, 0x43E0)  # from 0 to 448
    values = torch.nn.functional.pad(values, (0, -len(values) % (4 * 127))).view(-1, 127)
    x = torch.nn.functional.pad(values, (1, 0), value=448).reshape(-1, 512)
    payload, scales = oracle.encode(x, form)
    assert torch.equal(bits(payload), bits(x.float().to(FP8)))
    assert scales.unique().tolist() == [0x7F7F7F7F if form == "fp8_ue8m0" else 1]


def test_blocks_of_every_size_are_encoded_as_torch_does_it():
    x = blocks_of_every_size()
    scales, factors = quotients(x)
    products = x.float() * factors.repeat_interleave(128, dim=1)
    payload, encoded_scales = oracle.encode(x, "fp8")
    assert torch.equal(encoded_scales, scales)
    assert torch.equal(bits(payload), bits(products.to(FP8)))
    assert products.max() > 448  # by a hair: a factor was rounded up


def test_blocks_of_every_size_with_powers_of_two_as_torch_does_it():
    x = blocks_of_every_size()
    scales = quotients(x)[0]
    powers = torch.tensor([[power_at_least(value) for value in row] for row in scales.tolist()])
    products = x.float() / powers.repeat_interleave(128, dim=1)
    payload, encoded_scales = oracle.encode(x, "fp8_round_scale")
    assert torch.equal(encoded_scales, powers)
    assert torch.equal(bits(payload), bits(products.to(FP8)))
    packed_payload, packed = oracle.encode(x, "fp8_ue8m0")
    assert torch.equal(bits(packed_payload), bits(payload))
    exponents = torch.log2(powers.double()).round().to(torch.uint8) + 127
    assert torch.equal(bits(packed), exponents)  # on a machine with the lowest byte first


def test_any_float32_is_rounded_as_torch_rounds_it():
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(0, 2**31, (200_000,), generator=generator).to(torch.int32)
    near = torch.randint(0x3A00_0000, 0x43E0_0000, codes.shape, generator=generator)
    values = torch.cat([codes, near.to(torch.int32)]).view(torch.float32)
    values = torch.cat([values, -values, torch.tensor([463.99997, 464.0])])
    values = values[values.isnan() | (values.abs() <= 464)]  # beyond, versions of torch differ
    assert values.isnan().any()
    assert torch.equal(bits(oracle._to_e4m3(values.double())), bits(values.to(FP8)))


def test_every_byte_is_decoded_as_torch_decodes_it():
    payload = torch.arange(256, dtype=torch.uint8).view(2, 128).view(FP8)
    decoded = oracle.decode((payload, torch.ones((2, 1))), "fp8")
    torch.testing.assert_close(decoded, payload.double(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(decoded.signbit(), payload.double().signbit())


def test_the_example_of_encode():
    payload, scales = oracle.encode(row([448, 18, -17, 0.01]), "fp8")
    assert scales.tolist() == [[1]]
    assert payload.double()[0, :4].tolist() == [448, 18, -16, 5 * 2**-9]
    assert bits(payload)[0, :5].tolist() == [0x7E, 0x59, 0xD8, 0x05, 0]


def test_the_example_of_decode():
    payload = oracle.encode(row([448, 18, -17]), "fp8")[0]
    decoded = oracle.decode((payload, torch.tensor([[2.0]])), "fp8")
    assert decoded[0, :3].tolist() == [896, 36, -32]
    assert decoded.dtype == torch.float64


def test_of_two_equally_near_e4m3_values_the_even_byte_is_taken():
    x = [17, 19, -17, -19, 2**-10, 3 * 2**-10, 5 * 2**-10, -(2**-10), 0.0, -0.0]
    payload, _ = oracle.encode(row([448, *x]), "fp8")
    expected = [16, 20, -16, -20, 0, 2 * 2**-9, 2 * 2**-9, 0, 0, 0]
    assert payload.double()[0, 1:11].tolist() == expected
    assert bits(payload)[0, 8:11].tolist() == [0x80, 0, 0x80]


@pytest.mark.parametrize("form", FP8_FORMATS)
def test_zeros_keep_their_sign_and_the_smallest_scale(form):
    payload, scales = oracle.encode(row([0.0, -0.0], width=512), form)
    assert bits(payload)[0].tolist() == [0, 0x80] + [0] * 510
    smallest = torch.tensor(1e-4) / torch.tensor(448.0)
    expected = {"fp8": smallest.item(), "fp8_round_scale": 2**-22, "fp8_ue8m0": 0x69696969}
    assert scales.unique().tolist() == [expected[form]]


@pytest.mark.parametrize("exponent", [-21, -1, 0, 1, 119])
def test_a_scale_that_is_a_power_of_two_stays(exponent):
    power = 2.0**exponent
    payload, scales = oracle.encode(row([448 * power]), "fp8_round_scale")
    assert (payload[0, 0].item(), scales.tolist()) == (448, [[power]])
    payload, scales = oracle.encode(row([450 * power]), "fp8_round_scale")
    assert (payload[0, 0].item(), scales.tolist()) == (224, [[2 * power]])


def test_four_exponents_are_packed_with_the_first_lowest():
    x = torch.cat([row([448 * 2.0**exponent]) for exponent in (-1, 0, 1, 2)], dim=1)
    payload, scales = oracle.encode(x, "fp8_ue8m0")
    assert scales.dtype == torch.int32
    assert scales.tolist() == [[126 + (127 << 8) + (128 << 16) + ((129 - 256) << 24)]]
    assert torch.equal(oracle.decode((payload, scales), "fp8_ue8m0"), x.double())


def test_int8_rounds_half_to_even():
    x = row([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127], width=9)
    payload, scales = oracle.encode(x, "int8")
    assert payload.tolist() == [[127, 0, 2, 2, 0, -2, -2, -127, 0]]
    assert (payload.dtype, scales.dtype, scales.tolist()) == (torch.int8, torch.float32, [1])
    assert oracle.decode((payload, scales), "int8").tolist() == payload.tolist()


def test_int8_rows_of_every_size_are_encoded_as_float32_does_it():
    x = blocks_of_every_size()[10:]
    amax = x.float().abs().amax(dim=1, keepdim=True)
    factors = torch.full_like(amax, 127) / amax
    payload, scales = oracle.encode(x, "int8")
    fits = factors.isfinite().flatten()
    assert torch.equal(payload[fits], (x.float() * factors)[fits].round().to(torch.int8))
    expected = (torch.ones_like(factors) / factors).flatten()
    assert torch.equal(scales, expected)
    assert not torch.equal(expected, (amax / 127).flatten())  # which is rounded once


@pytest.mark.parametrize("value", [0.0, -0.0, 2.0**-133, 2.0**-122])
def test_int8_rows_too_small_for_a_factor_are_zeros(value):
    payload, scales = oracle.encode(row([value, -value]), "int8")
    assert not payload.any()
    assert scales.tolist() == [0]


def test_bf16_is_moved_bit_for_bit():
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).view(256, 256)
    assert torch.equal(bits(oracle.encode(x, "bf16")), bits(x))


@pytest.mark.parametrize("form", FP8_FORMATS)
@pytest.mark.parametrize(("bad", "scale"), BAD)
def test_what_fp8_cannot_encode_is_visible_in_its_block_alone(form, bad, scale):
    x = row([1, -1, 0], width=512).repeat(9, 1)  # so many that torch works on several at once
    x[:, 128:] = 448
    x.view(torch.int16)[:, 2] = bad - 2**16 if bad >= 2**15 else bad
    payload, scales = oracle.encode(x, form)
    assert bits(payload).tolist() == [[0x7F] * 128 + [0x7E] * 384] * 9
    if form == "fp8_ue8m0":
        assert scales.tolist() == [[0x7F7F7FFF]] * 9
    else:
        first = scale if form == "fp8" else math.inf
        assert torch.equal(bits(scales), bits(torch.tensor([[first, 1, 1, 1]] * 9)))
    decoded = oracle.decode((payload, scales), form)
    assert decoded[:, :128].isnan().all()
    assert (decoded[:, 128:] == 448).all()


@pytest.mark.parametrize(("bad", "scale"), BAD)
def test_what_int8_cannot_encode_is_visible_in_its_row_alone(bad, scale):
    x = torch.cat([row([1, 0]), row([127])]).repeat(9, 1)
    x.view(torch.int16)[::2, 1] = bad - 2**16 if bad >= 2**15 else bad
    payload, scales = oracle.encode(x, "int8")
    assert payload.tolist() == [[0] * 128, [127] + [0] * 127] * 9
    assert torch.equal(bits(scales), bits(torch.tensor([scale, 1] * 9)))
    decoded = oracle.decode((payload, scales), "int8")
    assert decoded[::2].isnan().all()
    assert (decoded[1::2, 0] == 127).all()


def test_an_exponent_of_255_is_nan():
    payload = torch.zeros((1, 512), dtype=torch.uint8).view(FP8)
    decoded = oracle.decode((payload, torch.tensor([[0x7F7FFF7F]], dtype=torch.int32)), "fp8_ue8m0")
    assert decoded.isnan().tolist() == [[False] * 128 + [True] * 128 + [False] * 256]


@pytest.mark.parametrize("form", oracle.FORMATS)
def test_tokens_that_are_a_view_and_no_tokens(form):
    x = torch.randn((1024, 6), generator=torch.Generator().manual_seed(5)).bfloat16().t()
    view, copy = oracle.encode(x, form), oracle.encode(x.contiguous(), form)
    none = oracle.encode(x[:0], form)
    for a, b, c in zip(parts(view), parts(copy), parts(none), strict=True):
        assert torch.equal(bits(a), bits(b))
        assert (c.dtype, c.shape) == (a.dtype, (0, *a.shape[1:]))


def test_an_unknown_format_is_named():
    with pytest.raises(ValueError, match="'fp4' is not one of bf16, fp8, "):
        oracle.encode(row([1]), "fp4")


def parts(encoded):
    return encoded if isinstance(encoded, tuple) else (encoded,)


def test_arrivals():
    assert oracle.arrivals(TOPK_IDXS, num_experts=4) == [
        [(0, 0), (1, 0)],
        [(0, 1)],
        [(0, 0), (1, 0)],
        [(0, 2)],
    ]
    assert oracle.arrivals(TOPK_IDXS, num_experts=4, live={0}) == [[(0, 0)], [(0, 1)], [], []]


def test_dispatch():
    first, second = oracle.dispatch(XS, TOPK_IDXS, num_experts=4, format="bf16")
    assert [rows.tolist() for rows in first.rows] == [[[10], [40]], [[20]]]
    assert [rows.tolist() for rows in second.rows] == [[[10], [40]], [[30]]]
    assert first.src_info == [[0, 0], [1]]
    assert second.src_info == [[0, 0], [2]]
    for rank in (first, second):
        assert {rows.dtype for rows in rank.rows} == {torch.bfloat16}
        assert rank.scales is None
        assert rank.recv_count == [2, 1]
        assert rank.layout_range == [[(0, 1), (1, 1)], [(0, 1), (1, 0)]]


def test_a_rank_that_is_not_alive_neither_sends_nor_receives():
    first, second = oracle.dispatch(XS, TOPK_IDXS, num_experts=4, format="bf16", live={1})
    assert (first.recv_count, first.src_info) == ([0, 0], [[], []])
    assert [rows.shape for rows in first.rows] == [(0, 1), (0, 1)]
    assert [rows.tolist() for rows in second.rows] == [[[40]], []]
    assert second.layout_range == [[(0, 0), (0, 1)], [(0, 0), (0, 0)]]


def test_ranges_begin_inside_their_expert_even_where_nothing_came():
    idxs = [torch.empty((0, 1), dtype=torch.int64), torch.tensor([[1], [1]]), torch.tensor([[1]])]
    xs = [torch.zeros((len(idx), 4)).bfloat16() for idx in idxs]
    first, second, third = oracle.dispatch(xs, idxs, num_experts=3, format="int8")
    assert second.layout_range == [[(0, 0), (0, 2), (2, 1)]]
    assert second.src_info == [[0, 1, 0]]
    assert first.layout_range == third.layout_range == [[(0, 0), (0, 0), (0, 0)]]


@pytest.mark.parametrize("form", oracle.FORMATS)
def test_rows_and_scales_are_those_of_their_origin(form):
    world = World(form)
    received = world.dispatched()
    values = [oracle.decode(oracle.encode(x, form), form) for x in world.xs]
    for expert in range(world.num_experts):
        rank, local = divmod(expert, world.num_local)
        origins = [
            (source, token)
            for source, topk_idx in enumerate(world.topk_idxs)
            for token, choices in enumerate(topk_idx.tolist())
            if expert in choices
        ]
        expected = torch.stack([values[source][token] for source, token in origins])
        assert torch.equal(decoded_slab(received[rank], local, form), expected)


@pytest.mark.parametrize(
    ("form", "bound"), [("bf16", 1e-30), ("int8", 1e-4), *((form, 9e-4) for form in FP8_FORMATS)]
)
def test_identity_experts_give_back_what_was_sent(form, bound):
    world = World(form)
    rows = [
        [decoded_slab(slabs, local, form) for local in range(world.num_local)]
        for slabs in world.dispatched()
    ]
    returned = world.combined(rows)
    for rank, each in enumerate(returned):
        kept = world.weights[rank].double() * (world.topk_idxs[rank] >= 0)
        expected = world.xs[rank].double() * kept.sum(dim=1, keepdim=True)
        assert calc_diff(each.combined, expected) < bound


def test_combine_weights_and_sums():
    first, second = oracle.combine(ROWS, TOPK_IDXS, WEIGHTS, num_experts=4)
    assert first.combined.tolist() == [[7.5], [20], [22.5]]
    assert second.combined.tolist() == [[120]]
    assert first.combined.dtype == torch.float64
    assert first.topk_weights is None


def test_combine_knows_how_large_its_addends_are():
    weights = [torch.tensor([[0.5, -0.25], [-1, 9], [0.5, -0.5]]), WEIGHTS[1]]
    first, _ = oracle.combine(ROWS, TOPK_IDXS, weights, num_experts=4)
    assert first.combined.tolist() == [[2.5], [-20], [0]]
    assert first.magnitude.tolist() == [[7.5], [20], [30]]


def test_tokens_without_a_live_expert_get_zeros():
    first, second = oracle.combine(ROWS, TOPK_IDXS, WEIGHTS, num_experts=4, live={0})
    assert first.combined.tolist() == [[5], [20], [0]]
    assert second.combined.tolist() == second.magnitude.tolist() == [[0]]


def test_what_nobody_refers_to_is_not_read():
    rows = [[torch.cat([slab, torch.full((1, 1), math.nan)]) for slab in each] for each in ROWS]
    weights = [WEIGHTS[0].clone(), WEIGHTS[1]]
    weights[0][1, 1] = math.nan
    first, _ = oracle.combine(rows, TOPK_IDXS, weights, num_experts=4)
    assert first.combined.tolist() == [[7.5], [20], [22.5]]
    dead = [rows[0], []]
    first, _ = oracle.combine(dead, TOPK_IDXS, weights, num_experts=4, live={0})
    assert first.combined.tolist() == [[5], [20], [0]]


def test_sums_are_exact_where_float32_is_not():
    rows = [[torch.tensor([[value]]) for value in (1e8, 1.0, -1e8)]]
    (only,) = oracle.combine(rows, [torch.tensor([[0, 1, 2]])], [torch.ones((1, 3))], num_experts=3)
    assert only.combined.item() == 1


class World:
    """Three ranks with 5, 0 and 7 tokens, six experts, repeated and missing choices."""

    num_experts, num_local = 6, 2

    def __init__(self, form):
        generator = torch.Generator().manual_seed(6)
        self.form = form
        self.xs = [torch.randn((n, 512), generator=generator).bfloat16() for n in (5, 0, 7)]
        self.topk_idxs = [
            torch.randint(-1, self.num_experts, (len(x), 4), generator=generator) for x in self.xs
        ]
        self.weights = [torch.rand((len(x), 4), generator=generator) for x in self.xs]

    def dispatched(self):
        return oracle.dispatch(
            self.xs, self.topk_idxs, num_experts=self.num_experts, format=self.form
        )

    def combined(self, rows):
        return oracle.combine(rows, self.topk_idxs, self.weights, num_experts=self.num_experts)


def decoded_slab(slabs, local, form):
    rows = slabs.rows[local]
    return oracle.decode(rows if slabs.scales is None else (rows, slabs.scales[local]), form)


def differences(got, expected):
    """Which fields of what the ranks received differ, in bytes where they are tensors."""
    return {
        field
        for a, b in zip(got, expected, strict=True)
        for field in oracle.ReferenceSlabs._fields
        if comparable(getattr(a, field)) != comparable(getattr(b, field))
    }


def comparable(values):
    return [bits(v).tolist() if isinstance(v, torch.Tensor) else v for v in values or []]


@pytest.mark.parametrize("form", oracle.FORMATS)
def test_two_swapped_rows_are_seen(form):
    world = World(form)
    world.topk_idxs[2][:2] = torch.tensor([0, 1, -1, -1])  # both go to the same experts
    world.xs[2][1] *= 8
    expected = world.dispatched()
    world.xs[2][:2] = world.xs[2][:2].flip(0)
    fields = {"rows"} if form == "bf16" else {"rows", "scales"}
    assert differences(world.dispatched(), expected) == fields


@pytest.mark.parametrize("form", [form for form in oracle.FORMATS if form != "bf16"])
def test_a_flipped_scale_is_seen(form):
    world = World(form)
    spoiled = world.dispatched()
    assert not differences(spoiled, world.dispatched())
    bits(spoiled[0].scales[1]).view(-1)[-1] ^= 1
    assert differences(spoiled, world.dispatched()) == {"scales"}
    exact, wrong = (decoded_slab(each[0], 1, form) for each in (world.dispatched(), spoiled))
    assert calc_diff(exact, wrong) > 0


def test_a_moved_choice_and_a_repeated_one_are_seen():
    world = World("bf16")
    world.topk_idxs[0][:2] = torch.tensor([[0, 1, -1, -1], [2, 3, 4, 5]])
    expected = world.dispatched()
    world.topk_idxs[0][0, 2] = 1  # already chosen
    assert not differences(world.dispatched(), expected)
    world.topk_idxs[0][0, 0] = 5
    fields = {"rows", "recv_count", "src_info", "layout_range"}
    assert differences(world.dispatched(), expected) == fields


def test_swapped_weights_and_swapped_rows_are_seen_in_sums():
    world = World("bf16")
    world.topk_idxs[2][0] = torch.tensor([0, 1, -1, -1])
    world.weights[2][0] = torch.tensor([0.25, 0.5, 1, 1])
    rows = [each.rows for each in world.dispatched()]
    expected = sums(world, rows)
    swapped = [[slab.clone() for slab in each] for each in rows]
    swapped[1][0][:2] = swapped[1][0][:2].flip(0)
    assert calc_diff(sums(world, swapped), expected) > 1e-3
    world.weights[2][0, :2] = world.weights[2][0, :2].flip(0)
    assert torch.equal(sums(world, rows), expected)  # both experts sent the same row
    world.weights[2][0, 1:3] = world.weights[2][0, 1:3].flip(0)
    assert calc_diff(sums(world, rows), expected) > 1e-3


def sums(world, rows):
    return torch.cat([each.combined for each in world.combined(rows)])
