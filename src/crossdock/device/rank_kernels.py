"""What is worked out once for high-throughput calls of a kind: kernels, constants, sizes."""

from __future__ import annotations

import functools
from types import MappingProxyType
from typing import NamedTuple

import torch
import triton.language as tl

from crossdock.config import align
from crossdock.device.constants import next_power_of_two, widest_word
from crossdock.device.launch import Kernel
from crossdock.device.memory import BACK_UNIT, UNIT, DeviceCapacity
from crossdock.device.watch import State
from crossdock.formats import RowFormat
from crossdock.ops.triton import rank_places, rank_records, rank_routes, rank_rows, rank_sums
from crossdock.ops.triton.links import Group

__all__ = [
    "CombinePlan",
    "CombineShape",
    "DispatchPlan",
    "DispatchShape",
    "Shares",
    "back_row",
    "combine_kernel",
    "fingerprint",
    "is_few",
    "place_kernel",
    "plan_combine",
    "plan_dispatch",
    "rank_row",
    "route_kernel",
    "send_kernel",
    "shares",
]

_DISPATCH_WORDS, _COMBINE_WORDS = 4096, 8192
"""Words of 8 bytes that a program moves at once."""
_FEW_CHOICES, _FEW_EXPERTS = 16, 256
"""There is room for so many in any case, so that a heap need not grow for them."""
_FEW_PROGRAMS = 32
"""Each has so much to do that the last of a larger piece is not what is waited for."""
_DTYPES = MappingProxyType(
    {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
)


def rank_row(
    form: RowFormat,
    *,
    num_topk: int,
    has_weights: bool,
    local: int,
    viewed: bool = False,
    few_programs: bool = False,
    checked: bool = False,
    tile_bytes: int = 0,
) -> rank_records.RankRow:
    """The constants of the dispatch kernels."""
    word = widest_word(form.payload_bytes)
    num_words = max(form.payload_bytes // min(word, 8), 1)
    padded = next_power_of_two(num_words)
    scales_at = align(form.payload_bytes, 16)
    check_at = align(scales_at + form.scale_bytes, 8)
    return rank_records.RankRow(
        num_bytes=form.payload_bytes,
        word=word,
        num_words=num_words,
        padded_words=padded,
        scale_words=form.scale_bytes // 4,
        padded_scales=next_power_of_two(max(form.scale_bytes // 4, 1)),
        scales_at=scales_at,
        check_at=check_at,
        stride=align(check_at + 8 * checked, 16),
        num_topk=num_topk,
        padded_topk=next_power_of_two(max(num_topk, 1)),
        has_weights=has_weights,
        local=local,
        rows=_rows_at_once(tile_bytes // 8 or _DISPATCH_WORDS, padded),
        chunk=(4 if few_programs else 2) * UNIT,
        unit=UNIT,
        back=BACK_UNIT,
        checked=checked,
        viewed=viewed,
    )


def back_row(
    dtype: torch.dtype,
    hidden: int,
    *,
    num_topk: int,
    num_bias: int,
    num_ranks: int,
    few_programs: bool = False,
    checked: bool = False,
    tile_bytes: int = 0,
) -> rank_records.BackRow:
    """The constants of the combine kernel."""
    num_bytes = hidden * dtype.itemsize
    word = widest_word(num_bytes)
    num_words = max(num_bytes // min(word, 8), 1)
    padded = next_power_of_two(num_words)
    weights_at, columns = align(num_bytes, 16), next_power_of_two(max(hidden, 1))
    check_at = align(weights_at + 4 * num_topk, 8)
    at_once = tile_bytes // 8 or _COMBINE_WORDS
    most = 8 * at_once // dtype.itemsize
    terms = max(min(num_ranks, most // columns), 1)
    return rank_records.BackRow(
        element=_DTYPES[dtype],
        hidden=hidden,
        padded=columns,
        num_bytes=num_bytes,
        word=word,
        num_words=num_words,
        padded_words=padded,
        weights_at=weights_at,
        check_at=check_at,
        stride=align(check_at + 8 * checked, 16),
        num_topk=num_topk,
        padded_topk=next_power_of_two(max(num_topk, 1)),
        num_bias=num_bias,
        rows=_rows_at_once(at_once // 2, padded),
        sums=_rows_at_once(most // terms, columns),
        terms=terms,
        parts=-(-num_ranks // terms),
        chunk=(4 if few_programs else 1) * BACK_UNIT,
        unit=BACK_UNIT,
        checked=checked,
    )


def fingerprint(row: rank_records.RankRow, alignment: int) -> int:
    """A number that says what ranks must agree on in a dispatch."""
    rows = (row.num_bytes, row.scale_words, row.stride, row.checked)
    shape = (*rows, row.num_topk, row.has_weights, row.local, alignment)
    return hash(shape) & 0x7FFFFFFF


@functools.cache
def route_kernel(local: int, group: Group, *, times: bool = False) -> Kernel:
    """The kernel that counts rows."""
    padded = next_power_of_two(max(local, 1))
    constants = (State.PLACE, local, padded, times, group)
    return Kernel(rank_routes.route_ranks, *constants, num_warps=8)


@functools.cache
def send_kernel(row: rank_records.RankRow, group: Group, *, numbers: bool) -> Kernel:
    """The kernel that sends rows, and numbers them unless an earlier call has."""
    num_warps = _num_warps(row.rows * row.padded_words)
    return Kernel(rank_rows.send_ranks, State.PLACE, row, numbers, group, num_warps=num_warps)


@functools.cache
def place_kernel(
    row: rank_records.RankRow, group: Group, *, pads: bool, times: bool = False
) -> Kernel:
    """The kernel that places rows."""
    num_warps = _num_warps(row.rows * row.padded_words)
    return Kernel(rank_places.place_ranks, row, pads, times, group, num_warps=num_warps)


@functools.cache
def combine_kernel(row: rank_records.BackRow, group: Group, *, times: bool = False) -> Kernel:
    """The kernel that sends rows back and adds them up; of those two parts are in registers."""
    num_rows = max(row.rows, row.terms * row.sums // 2)
    num_warps = _num_warps(num_rows * row.padded_words)
    return Kernel(rank_sums.combine_ranks, row, times, group, num_warps=num_warps)


class DispatchShape(NamedTuple):
    """What dispatches of a kind have in common.

    Attributes:
        form: of rows.
        num_topk: K; 0 if the call names no experts.
        has_weights: whether weights travel.
        local: L.
        numbers: whether rows have to be numbered.
        pads: whether the result has rows behind those that come.
        viewed: whether rows stay where they land.
        counts_waits: whether programs measure how long each rank is waited for.
        few_programs: see `is_few`.
        checked: whether sums of rows travel with them.
        num_tokens: tokens of a rank to make room for in advance.
        tile_bytes: see `Config`.
        group: the ranks.
    """

    form: RowFormat
    num_topk: int
    has_weights: bool
    local: int
    numbers: bool
    pads: bool
    viewed: bool
    counts_waits: bool
    few_programs: bool
    checked: bool
    num_tokens: int
    tile_bytes: int
    group: Group


class DispatchPlan(NamedTuple):
    """What is worked out once for dispatches of a kind.

    Attributes:
        row: how rows are made.
        route, send, place: the kernels.
        capacity: what they and their combines need of the heap.
        num_timers: programs that measure how long each rank is waited for.
    """

    row: rank_records.RankRow
    route: Kernel
    send: Kernel
    place: Kernel
    capacity: DeviceCapacity
    num_timers: int


@functools.cache
def plan_dispatch(shape: DispatchShape) -> DispatchPlan:
    """The plan of dispatches of a kind."""
    form, group = shape.form, shape.group
    row = rank_row(
        form,
        num_topk=shape.num_topk,
        has_weights=shape.has_weights,
        local=shape.local,
        viewed=shape.viewed,
        few_programs=shape.few_programs,
        checked=shape.checked,
        tile_bytes=shape.tile_bytes,
    )
    num_topk = max(shape.num_topk, _FEW_CHOICES)
    back = form.hidden * max(2, min(form.element.itemsize, 4)) + 4 * num_topk
    return DispatchPlan(
        row,
        route_kernel(shape.local, group, times=shape.counts_waits),
        send_kernel(row, group, numbers=shape.numbers),
        place_kernel(row, group, pads=shape.pads, times=shape.counts_waits),
        DeviceCapacity(
            num_tokens=shape.num_tokens,
            token_bytes=row.stride,
            choice_bytes=2 * 4 * num_topk,
            sum_bytes=align(back, 16) + 16,
            experts=max(shape.local, _FEW_EXPERTS),
        ),
        num_timers=group.size * shape.counts_waits,
    )


class CombineShape(NamedTuple):
    """What combines of a kind have in common: dtype, H, K (0 without weights), biases, ranks.

    Also whether programs measure how long each rank is waited for, `is_few`, whether sums of rows
    travel with them, and `Config.tile_bytes`.
    """

    dtype: torch.dtype
    hidden: int
    num_topk: int
    num_bias: int
    counts_waits: bool
    few_programs: bool
    checked: bool
    tile_bytes: int
    group: Group


class CombinePlan(NamedTuple):
    """What is worked out once for combines of a kind.

    Attributes:
        kernel, capacity, num_timers: see `DispatchPlan`.
    """

    kernel: Kernel
    capacity: DeviceCapacity
    num_timers: int


@functools.cache
def plan_combine(shape: CombineShape) -> CombinePlan:
    """The plan of combines of a kind."""
    row = back_row(
        shape.dtype,
        shape.hidden,
        num_topk=shape.num_topk,
        num_bias=shape.num_bias,
        num_ranks=shape.group.size,
        few_programs=shape.few_programs,
        checked=shape.checked,
        tile_bytes=shape.tile_bytes,
    )
    return CombinePlan(
        combine_kernel(row, shape.group, times=shape.counts_waits),
        DeviceCapacity(sum_bytes=row.stride),
        num_timers=shape.group.size * shape.counts_waits,
    )


class Shares(NamedTuple):
    """How many programs send, and how many place or add up."""

    senders: int
    others: int


@functools.cache
def shares(num_sms: int, *, senders: int = 0, back: bool = False, viewed: bool = False) -> Shares:
    """Five programs of twelve keep the link busy; more than 32 do no good.

    Half of them, and up to 64, where nothing is placed, and on the way back. At the beginning of a
    dispatch one more for each rank numbers the rows, for some microseconds.

    Args:
        num_sms: programs in all.
        senders: so many send; 0 for what is said above.
        back: on the way back.
        viewed: nothing is placed.
    """
    part, most = (num_sms // 2, 64) if back or viewed else (num_sms * 5 // 12, 32)
    senders = senders or min(max(part, 1), most)
    return Shares(senders, max(num_sms - senders, 1))


def is_few(shares: Shares) -> bool:
    """Whether there are so few programs that they had better raise, and wait for, more flags."""
    return max(shares) < _FEW_PROGRAMS


def _rows_at_once(most: int, padded: int) -> int:
    """Rows of a tile of so many words at most, a power of two."""
    rows = max(min(most // padded, BACK_UNIT), 1)
    return 1 << (rows.bit_length() - 1)


def _num_warps(tile_words: int) -> int:
    return max(min(tile_words // 256, 32), 4)
