"""The kernels of low-latency calls, and the constants they are compiled for."""

from __future__ import annotations

import functools
from typing import NamedTuple

from crossdock.config import align
from crossdock.device.constants import next_power_of_two, widest_word
from crossdock.device.launch import Kernel
from crossdock.formats import ELEMENT_CODES, ScaleRule, TokenFormat
from crossdock.ops.triton import expert_records, expert_rows, expert_sums
from crossdock.ops.triton.sync import Group

__all__ = ["CombineShape", "DispatchShape", "Prepared", "combine_kernel", "dispatch_kernel"]

_DISPATCH_WARPS = 8
_COMBINE_WARPS = 4
_TELLERS = 4
_MAX_TILE = 1 << 14
"""Elements of the largest tile in which choices are compared with each other."""


class DispatchShape(NamedTuple):
    """What a compiled dispatch depends on."""

    form: TokenFormat
    hidden: int
    num_topk: int
    num_local: int
    group: Group
    has_weights: bool
    compact: bool
    counts_waits: bool
    counts_rows: bool
    use_casts: bool


class Prepared(NamedTuple):
    """A dispatch kernel and its constants."""

    kernel: Kernel
    row: expert_records.ExpertRow
    experts: expert_records.Experts


@functools.cache
def dispatch_kernel(shape: DispatchShape) -> Prepared:
    """The dispatch kernel for calls of a shape."""
    row, experts = _row_of(shape), _experts_of(shape)
    group = shape.group
    kernel = Kernel(expert_rows.dispatch_experts, row, experts, group, num_warps=_DISPATCH_WARPS)
    return Prepared(kernel, row, experts)


class CombineShape(NamedTuple):
    """What a compiled combine depends on."""

    hidden: int
    num_topk: int
    num_local: int
    group: Group
    is_float: bool
    knows_weights: bool


@functools.cache
def combine_kernel(shape: CombineShape) -> tuple[Kernel, expert_sums.Partial]:
    """The combine kernel for calls of a shape, and its constants."""
    partial = _partial_of(shape)
    group = shape.group
    kernel = Kernel(expert_sums.combine_experts, partial, group, num_warps=_COMBINE_WARPS)
    return kernel, partial


def _row_of(shape: DispatchShape) -> expert_records.ExpertRow:
    form, row = shape.form, shape.form.row(shape.hidden)
    columns = form.block or shape.hidden
    num_blocks = -(-shape.hidden // columns)
    word = widest_word(row.payload_bytes)
    num_words = row.payload_bytes // min(word, 8)
    scales_at = align(row.payload_bytes, 16)
    choices_at = align(scales_at + row.scale_bytes, 16)
    choices = 8 * shape.num_topk + 4 * shape.num_topk * shape.has_weights
    num_scales = row.scale_bytes // 4
    return expert_records.ExpertRow(
        rule="" if form.rule is ScaleRule.NONE else form.rule.value,
        element=ELEMENT_CODES[form.element],
        min_amax=form.min_amax,
        use_casts=shape.use_casts,
        blocks=next_power_of_two(num_blocks),
        block=next_power_of_two(columns),
        hidden=shape.hidden,
        num_bytes=row.payload_bytes,
        word=word,
        num_words=num_words,
        padded_words=next_power_of_two(num_words),
        num_scales=num_scales,
        padded_scales=next_power_of_two(max(num_scales, 1)),
        scales_at=scales_at,
        choices_at=choices_at,
        stride=align(choices_at + choices, 16),
    )


def _experts_of(shape: DispatchShape) -> expert_records.Experts:
    padded = next_power_of_two(max(shape.num_topk, 1))
    return expert_records.Experts(
        num_topk=shape.num_topk,
        padded_topk=padded,
        local=shape.num_local,
        padded_local=next_power_of_two(shape.num_local),
        bins=next_power_of_two(shape.num_local * shape.group.size + 1),
        tokens=max(min(_MAX_TILE // padded**2, 128), 1),
        has_weights=shape.has_weights,
        compact=shape.compact,
        counts_waits=shape.counts_waits,
        counts_rows=shape.counts_rows,
    )


def _partial_of(shape: CombineShape) -> expert_sums.Partial:
    hidden, num_topk = shape.hidden, shape.num_topk
    return expert_sums.Partial(
        hidden=hidden,
        padded=next_power_of_two(hidden),
        is_float=shape.is_float,
        stride=align(hidden * (4 if shape.is_float else 2), 16),
        aligned=hidden % 8 == 0,
        num_topk=num_topk,
        padded_topk=next_power_of_two(max(num_topk, 1)),
        local=shape.num_local,
        tellers=0 if shape.knows_weights else _TELLERS,
        at_once=256,
    )
