"""What is worked out once for low-latency calls of a kind: kernels, constants, sizes."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from crossdock.config import align
from crossdock.device.constants import next_power_of_two, widest_word
from crossdock.device.launch import Kernel
from crossdock.device.memory import DeviceCapacity
from crossdock.device.slabs import SlabLayout, slab_layout
from crossdock.formats import ELEMENT_CODES, RowFormat, ScaleRule, TokenFormat
from crossdock.logfmt import log_row
from crossdock.ops.triton import expert_records, expert_rows, expert_sums, expert_views
from crossdock.ops.triton.links import Group
from crossdock.topology import num_local_experts

__all__ = [
    "NOTED",
    "PIECE",
    "CombinePlan",
    "CombineShape",
    "DispatchPlan",
    "DispatchShape",
    "expert_row",
    "partial_sum",
    "plan_combine",
    "plan_dispatch",
]

NOTED = 16
"""Slots of views that a program notes at once."""

PIECE = 2048
"""Columns that a program reads at once of a row of every rank."""

_DISPATCH_WARPS = 4
_COMBINE_WARPS = 4
_LOG_WARPS = 8
_TELLERS = 4
_LOG_BLOCK = 64
_PARTIALS = (torch.bfloat16, torch.float32)
_MAX_TILE = 1 << 14
"""Elements of the largest tile in which choices are compared with each other."""


class DispatchShape(NamedTuple):
    """What dispatches of a kind have in common."""

    form: TokenFormat
    hidden: int
    num_topk: int
    num_slots: int
    num_experts: int
    has_weights: bool
    compact: bool
    counts_waits: bool
    counts_rows: bool
    checked: bool = False
    viewed: bool = False


class DispatchPlan(NamedTuple):
    """What is worked out once for dispatches of a kind.

    Attributes:
        kernel: compiled for them.
        row: how rows are made.
        layout: of what they bring.
        capacity: what they and their combines need of the heap.
        numbers: the end of `expert_records.Slabs`: what lies where, and strides of scales.
        num_timers: programs that measure how long each rank is waited for.
    """

    kernel: Kernel
    row: expert_records.ExpertRow
    layout: SlabLayout
    capacity: DeviceCapacity
    numbers: tuple[int, ...]
    num_timers: int


def plan_dispatch(
    shape: DispatchShape, group: Group, *, back_bytes: int, use_casts: bool
) -> DispatchPlan:
    """The plan of dispatches of a kind.

    Args:
        shape: their kind.
        group: the ranks.
        back_bytes: of a row on its way back.
        use_casts: whether the hardware rounds to fp8.
    """
    experts = _experts_of(shape, group)
    row = expert_row(shape, use_casts=use_casts)
    layout = slab_layout(
        shape.form,
        shape.hidden,
        num_slots=shape.num_slots,
        num_ranks=group.size,
        experts=experts,
    )
    capacity = DeviceCapacity(
        slots=shape.num_slots,
        row_bytes=row.stride,
        back_bytes=align(align(back_bytes, 16) + 8 * shape.checked, 16),
        topk=shape.num_topk,
        experts=experts.local,
    )
    return DispatchPlan(
        _dispatch_kernel(row, experts, group),
        row,
        layout,
        capacity,
        (*layout.extras[:3], *layout.kernel_strides),
        group.size * shape.counts_waits,
    )


@functools.cache
def _dispatch_kernel(
    row: expert_records.ExpertRow, experts: expert_records.Experts, group: Group
) -> Kernel:
    function = expert_views.leave_experts if experts.viewed else expert_rows.dispatch_experts
    more = (NOTED,) if experts.viewed else ()
    return Kernel(
        function, row, experts, *more, group, num_warps=_DISPATCH_WARPS, overlaps=group.overlaps
    )


class CombineShape(NamedTuple):
    """What combines of a kind have in common."""

    hidden: int
    num_topk: int
    num_slots: int
    num_experts: int
    use_logfmt: bool
    knows_weights: bool
    counts_waits: bool
    compact: bool
    x_is_compact: bool
    checked: bool = False
    viewed: bool = False
    pulls: bool = False


class CombinePlan(NamedTuple):
    """What is worked out once for combines of a kind.

    Attributes:
        kernel: compiled for them.
        capacity: what they need of the heap.
        num_tellers: programs that send weights ahead.
        num_timers: see `DispatchPlan`.
    """

    kernel: Kernel
    capacity: DeviceCapacity
    num_tellers: int
    num_timers: int


def plan_combine(shape: CombineShape, group: Group, *, partials: torch.dtype) -> CombinePlan:
    """The plan of combines of a kind.

    Args:
        shape: their kind.
        group: the ranks.
        partials: dtype of the sums that travel back.
    """
    partial = partial_sum(shape, group, is_float=partials is torch.float32)
    capacity = DeviceCapacity(
        slots=shape.num_slots,
        back_bytes=partial.stride,
        topk=shape.num_topk,
        experts=partial.local,
    )
    return CombinePlan(
        _return_kernel(partial, group, pulls=shape.pulls)
        if shape.viewed
        else _combine_kernel(partial, group),
        capacity,
        partial.tellers,
        group.size * shape.counts_waits,
    )


@functools.cache
def _combine_kernel(partial: expert_sums.Partial, group: Group) -> Kernel:
    num_warps = _LOG_WARPS if partial.is_log else _COMBINE_WARPS
    return Kernel(
        expert_sums.combine_experts,
        partial,
        group,
        num_warps=num_warps,
        overlaps=group.overlaps,
    )


def expert_row(shape: DispatchShape, *, use_casts: bool) -> expert_records.ExpertRow:
    """How rows of dispatches of a kind are made of bytes."""
    form, row = shape.form, shape.form.row(shape.hidden)
    word = widest_word(row.payload_bytes)
    num_words = row.payload_bytes // min(word, 8)
    scales_at = align(row.payload_bytes, 16)
    choices_at = align(scales_at + row.scale_bytes, 16)
    choices = 8 * shape.num_topk + 4 * shape.num_topk * shape.has_weights
    check_at = align(choices_at + choices, 8)
    num_scales = row.scale_bytes // 4
    return expert_records.ExpertRow(
        rule="" if form.rule is ScaleRule.NONE else form.rule.value,
        element=ELEMENT_CODES[form.element],
        min_amax=form.min_amax,
        use_casts=use_casts,
        block=form.block,
        hidden=shape.hidden,
        columns=_piece(shape.hidden, num_warps=_DISPATCH_WARPS, per_thread=8),
        num_bytes=row.payload_bytes,
        word=word,
        num_words=num_words,
        words=_piece(num_words, num_warps=_DISPATCH_WARPS, per_thread=16 // min(word, 8)),
        num_scales=num_scales,
        padded_scales=next_power_of_two(max(num_scales, 1)),
        scales_at=scales_at,
        choices_at=choices_at,
        checked=shape.checked,
        check_at=check_at,
        stride=align(check_at + 8 * shape.checked, 16),
    )


def _piece(width: int, *, num_warps: int, per_thread: int) -> int:
    return min(next_power_of_two(width), 32 * num_warps * per_thread)


def _experts_of(shape: DispatchShape, group: Group) -> expert_records.Experts:
    local = num_local_experts(shape.num_experts, group.size)
    padded = next_power_of_two(max(shape.num_topk, 1))
    return expert_records.Experts(
        num_topk=shape.num_topk,
        padded_topk=padded,
        local=local,
        padded_local=next_power_of_two(local),
        bins=next_power_of_two(max(shape.num_experts, 2)),
        tokens=max(min(_MAX_TILE // padded**2, 128), 1),
        has_weights=shape.has_weights,
        compact=shape.compact,
        counts_waits=shape.counts_waits,
        counts_rows=shape.counts_rows,
        viewed=shape.viewed,
    )


@functools.cache
def _return_kernel(partial: expert_sums.Partial, group: Group, *, pulls: bool) -> Kernel:
    return Kernel(
        expert_views.return_experts,
        partial,
        pulls,
        # Whose rows count is decided once for a row where ranks may be lost meanwhile.
        partial.padded if group.can_shrink else min(partial.padded, PIECE),
        group,
        num_warps=_COMBINE_WARPS,
        overlaps=group.overlaps,
    )


def partial_sum(shape: CombineShape, group: Group, *, is_float: bool) -> expert_sums.Partial:
    """How sums of combines of a kind travel."""
    hidden, num_topk = shape.hidden, shape.num_topk
    row = log_row(hidden) if shape.use_logfmt else RowFormat(_PARTIALS[is_float], hidden)
    ranges_at = align(row.payload_bytes, 16)
    check_at = align(ranges_at + row.scale_bytes, 8)
    local = num_local_experts(shape.num_experts, group.size)
    return expert_sums.Partial(
        hidden=hidden,
        padded=next_power_of_two(max(hidden, _LOG_BLOCK if shape.use_logfmt else 1)),
        is_float=is_float,
        is_log=shape.use_logfmt,
        ranges_at=ranges_at,
        checked=shape.checked,
        check_at=check_at,
        num_bytes=row.payload_bytes,
        padded_bytes=next_power_of_two(row.payload_bytes),
        stride=align(check_at + 8 * shape.checked, 16),
        aligned=hidden % 8 == 0,
        num_topk=num_topk,
        padded_topk=next_power_of_two(max(num_topk, 1)),
        local=local,
        padded_local=next_power_of_two(local),
        compact=shape.compact,
        x_is_compact=shape.x_is_compact,
        tellers=0 if shape.knows_weights else _TELLERS,
        at_once=256,
        counts_waits=shape.counts_waits,
    )
