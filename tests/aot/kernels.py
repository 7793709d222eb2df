"""The kernels of the device calls, compiled without a GPU, as the host would have them compiled.

Constants come from where the host takes them. Arguments are numbers: addresses, of 64 bits, or what
usually fits into 32. Which is which is said here, once, for all kernels. Nothing is told of any
number, since launches may not rely on one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from crossdock import formats
from crossdock.device import expert_kernels, rank_kernels
from crossdock.device.launch import Kernel, model_of
from crossdock.device.layout import layout_kernel
from crossdock.device.memory import NUM_STATES
from crossdock.ops.triton import (
    expert_records,
    expert_sums,
    rank_layouts,
    rank_records,
    rank_routes,
)
from crossdock.ops.triton.links import Group, Link
from tests.ops.quantize_kernels import usage_of

FORMATS = {
    "bf16": formats.BF16,
    "fp8": formats.FP8_BLOCK128,
    "fp8_ue8m0": formats.FP8_UE8M0,
    "int8": formats.INT8_ROW,
}


def types_of(*kinds: Any) -> tuple[Any, ...]:
    """What Triton calls the numbers of named tuples: those of the models that launches compile."""
    models = [model_of(kind) for kind in kinds]
    return tuple(
        type(model)(*("i64" if number >> 32 else "i32" for number in model)) for model in models
    )


SENT, RECEIVED, LINK = rank_records.Sent, rank_records.Received, Link
ROW_CALL = (LINK, rank_records.RowZone, rank_records.SentCall)
ARGUMENTS = {
    "lay_out_tokens": types_of(rank_layouts.LayoutOf),
    "route_ranks": types_of(SENT, RECEIVED, rank_routes.Learned, *ROW_CALL),
    "send_ranks": types_of(SENT, *ROW_CALL),
    "place_ranks": types_of(SENT, RECEIVED, *ROW_CALL),
    "combine_ranks": types_of(
        rank_records.Rows, rank_records.Sums, LINK, rank_records.BackZone, rank_records.BackCall
    ),
    "dispatch_experts": types_of(
        expert_records.Tokens,
        expert_records.Slabs,
        LINK,
        expert_records.Zone,
        expert_records.Call,
    ),
    "combine_experts": types_of(
        expert_sums.Chosen,
        expert_sums.Returned,
        LINK,
        expert_sums.ReturnZone,
        expert_sums.ReturnCall,
    ),
}
ARGUMENTS["leave_experts"] = types_of(
    expert_records.Tokens,
    expert_records.LandedViews,
    LINK,
    expert_records.Zone,
    expert_records.Call,
)
ARGUMENTS["return_experts"] = ARGUMENTS["combine_experts"]
"""The types of what a launch gives to a kernel, before its constants."""


class Shape(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        kernel: its name.
        form: how rows are encoded.
        hidden, num_topk, num_local, num_ranks: H, K, L, R; without K, no experts are named.
        brings_weights: whether weights travel with the rows.
        compact: how a low-latency dispatch lays rows out.
        is_turned: whether a combine is given them in the other layout.
        num_bias: of a combine.
        is_float: whether a low-latency combine sends float32.
        is_log: or in the logarithmic format.
        viewed: whether high-throughput rows stay where they land.
        counts_waits: of high-throughput calls; low-latency ones always do here.
        checked: whether sums of rows travel with them.
        shrinks: whether low-latency calls go on without ranks that are late.
        pulls: whether a combine of views reads what the other ranks have written.
        is_few: whether few programs make a high-throughput call.
    """

    kernel: str
    form: str = "bf16"
    hidden: int = 7168
    num_topk: int = 8
    num_local: int = 64
    num_ranks: int = 4
    brings_weights: bool = False
    compact: bool = False
    is_turned: bool = False
    num_bias: int = 0
    is_float: bool = False
    is_log: bool = False
    viewed: bool = False
    counts_waits: bool = False
    checked: bool = False
    shrinks: bool = False
    pulls: bool = False
    is_few: bool = False


class Tile(NamedTuple):
    """The bytes that a program moves at a time; 0 for none.

    Attributes:
        words: of rows that are moved as they are, where they are made of 16-byte words.
        elements: of rows that are computed with, where they are made of such words.
        encoded: of rows that are read so, and written with half as many bytes.
    """

    words: int = 0
    elements: int = 0
    encoded: int = 0


class Compiled(NamedTuple):
    """A compiled kernel.

    Attributes:
        ptx: its code.
        usage: its resources, such as `REG:54 STACK:0 SHARED:1024 LOCAL:0`.
        wide: 16-byte accesses that a thread makes, at least, to read a tile, or to write it.
    """

    ptx: str
    usage: str
    wide: Tile


def compile_shape(capability: int, shape: Shape) -> Compiled:
    kernel, tile = MAKERS[shape.kernel](shape, capability)
    types, constants = ARGUMENTS[shape.kernel], kernel._constants
    signature = [*types, *["constexpr"] * len(constants)]
    source = ASTSource(
        kernel._function,
        signature=dict(zip(kernel._function.arg_names, signature, strict=True)),
        constexprs={(len(types) + i,): value for i, value in enumerate(constants)},
    )
    target = GPUTarget("cuda", capability, 32)
    found = triton.compile(source, target=target, options=kernel.options)
    wide = Tile(*(num_bytes // (16 * 32 * kernel.options["num_warps"]) for num_bytes in tile))
    return Compiled(found.asm["ptx"], usage_of(found.asm["cubin"]), wide)


def group_of(shape: Shape, capability: int) -> Group:
    padded = triton.next_power_of_2(shape.num_ranks)
    return Group(
        shape.num_ranks,
        padded,
        NUM_STATES,
        is_compiled=True,
        can_shrink=shape.shrinks,
        overlaps=capability >= 90,
        looks=8 if shape.kernel.endswith("experts") and not shape.shrinks else 1,
    )


def make_dispatch_experts(shape: Shape, capability: int) -> tuple[Kernel, Tile]:
    """Rows are placed as they have come, or stay there; they are sent as they are or encoded."""
    kind = expert_kernels.DispatchShape(
        FORMATS[shape.form],
        shape.hidden,
        shape.num_topk,
        num_slots=128,
        num_experts=shape.num_local * shape.num_ranks,
        has_weights=shape.brings_weights,
        compact=shape.compact,
        counts_waits=True,
        counts_rows=True,
        checked=shape.checked,
        viewed=shape.kernel == "leave_experts",
    )
    use_casts = capability >= 89
    plan = expert_kernels.plan_dispatch(
        kind, group_of(shape, capability), back_bytes=0, use_casts=use_casts
    )
    row = expert_kernels.expert_row(kind, use_casts=use_casts)
    is_wide = row.word == 16
    encoded = 2 * row.hidden if row.rule and is_wide else 0
    moved = 0 if kind.viewed and encoded else row.num_bytes * is_wide
    return plan.kernel, Tile(moved, encoded=encoded)


def make_combine_experts(shape: Shape, capability: int) -> tuple[Kernel, Tile]:
    kind = expert_kernels.CombineShape(
        shape.hidden,
        shape.num_topk,
        num_slots=128,
        num_experts=shape.num_local * shape.num_ranks,
        use_logfmt=shape.is_log,
        knows_weights=shape.brings_weights,
        counts_waits=True,
        compact=shape.compact,
        x_is_compact=shape.compact != shape.is_turned,
        checked=shape.checked,
        viewed=shape.kernel == "return_experts",
        pulls=shape.pulls,
    )
    group, element = (
        group_of(shape, capability),
        torch.float32 if shape.is_float else torch.bfloat16,
    )
    plan = expert_kernels.plan_combine(kind, group, partials=element)
    partial = expert_kernels.partial_sum(kind, group, is_float=shape.is_float)
    is_wide = partial.aligned and not partial.is_log
    width = expert_kernels.PIECE if shape.pulls else partial.padded
    return plan.kernel, Tile(elements=2 * width * is_wide)


def row_of(shape: Shape) -> rank_records.RankRow:
    return rank_kernels.rank_row(
        FORMATS[shape.form].row(shape.hidden),
        num_topk=shape.num_topk,
        has_weights=shape.brings_weights,
        local=shape.num_local,
        viewed=shape.viewed,
        few_programs=shape.is_few,
        checked=shape.checked,
    )


def words_of(row: rank_records.BackRow | rank_records.RankRow, shape: Shape) -> int:
    """Nothing is sent by a rank that is alone."""
    return 8 * row.rows * row.padded_words if row.word == 16 and shape.num_ranks > 1 else 0


def make_lay_out_tokens(shape: Shape, capability: int) -> tuple[Kernel, Tile]:
    kernel, _ = layout_kernel(shape.num_topk, shape.num_local * shape.num_ranks, shape.num_ranks)
    return kernel, Tile()


def make_route_ranks(shape: Shape, capability: int) -> tuple[Kernel, Tile]:
    kernel = rank_kernels.route_kernel(
        shape.num_local, group_of(shape, capability), times=shape.counts_waits
    )
    return kernel, Tile()


def make_send_ranks(shape: Shape, capability: int) -> tuple[Kernel, Tile]:
    row = row_of(shape)
    return rank_kernels.send_kernel(row, group_of(shape, capability), numbers=True), Tile(
        words_of(row, shape)
    )


def make_place_ranks(shape: Shape, capability: int) -> tuple[Kernel, Tile]:
    """Views are not moved."""
    row = row_of(shape)
    kernel = rank_kernels.place_kernel(
        row, group_of(shape, capability), pads=True, times=shape.counts_waits
    )
    return kernel, Tile(words_of(row, shape) * (not shape.viewed))


def make_combine_ranks(shape: Shape, capability: int) -> tuple[Kernel, Tile]:
    """Rows are sent as they are, and added up where they have come."""
    num_topk = shape.num_topk if shape.brings_weights else 0
    element = torch.float32 if shape.is_float else torch.bfloat16
    row = rank_kernels.back_row(
        element,
        shape.hidden,
        num_topk=num_topk,
        num_bias=shape.num_bias,
        num_ranks=shape.num_ranks,
        few_programs=shape.is_few,
        checked=shape.checked,
    )
    sums = row.sums * row.padded * element.itemsize if row.word == 16 else 0
    kernel = rank_kernels.combine_kernel(row, group_of(shape, capability), times=shape.counts_waits)
    return kernel, Tile(words_of(row, shape), sums)


MAKERS = {
    "lay_out_tokens": make_lay_out_tokens,
    "dispatch_experts": make_dispatch_experts,
    "combine_experts": make_combine_experts,
    "leave_experts": make_dispatch_experts,
    "return_experts": make_combine_experts,
    "route_ranks": make_route_ranks,
    "send_ranks": make_send_ranks,
    "place_ranks": make_place_ranks,
    "combine_ranks": make_combine_ranks,
}
