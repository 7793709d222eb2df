"""The one place where results of low-latency calls are compared with the oracle.

As in `checks`, a comparison returns what is wrong, as text, rank by rank. Rows, scales, counts and
the handle must have the oracle's bits; a sum must lie between two bfloat16 numbers, mostly equal
ones, that follow from the oracle's exact sums and from where the calls are documented to round.

T tokens of a rank, K top-k, H hidden, R ranks, L experts of a rank, M slots for the tokens of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch

from crossdock import reference
from crossdock import reference_low_latency as oracle
from crossdock.cases import Routing
from tests.worlds.checks import describe, difference

DIFF_BOUNDS = {
    "bf16": 1e-5,
    "fp8": 9e-4,
    "fp8_round_scale": 9e-4,
    "fp8_ue8m0": 9e-4,
    "int8": 1e-4,
}
"""How far tokens may come back from how they left, in `calc_diff`, by format."""

LOGFMT_DIFF_BOUND = 1e-3
"""The same for sums that travel back in ten bits a value."""

_HALF_ULP = torch.finfo(torch.float32).eps / 2 * 1.01
"""Relative error of one float32 operation, and of operations on its result."""
_TINY = 2.0**-149
_LOGFMT_RELATIVE = 0.0225
"""Half a step where a block spans 32 powers of two or more, and float32 logarithms."""
_LOGFMT_ABSOLUTE = 2.0**-31.9
"""Of the largest magnitude: what is below may become zero."""


@dataclass(frozen=True)
class Form:
    """What all ranks agree on in one dispatch.

    Attributes:
        name: one of the oracle's formats.
        rows: "slab" or "compact".
        num_slots: M.
        hidden: H.
    """

    name: str
    rows: str
    num_slots: int
    hidden: int

    def shape(self, routing: Routing) -> tuple[int, ...]:
        """How the rows of a rank are laid out: [L, R * M], or compact [R * M * min(K, L)]."""
        num_ranks, num_topk = len(routing.topk_idxs), routing.topk_idxs[0].shape[1]
        num_local, slab = routing.num_experts // num_ranks, num_ranks * self.num_slots
        return (num_local, slab) if self.rows == "slab" else (slab * min(num_topk, num_local),)

    def places(self, recv_count: Sequence[int], routing: Routing) -> list[slice]:
        """Where the rows of each expert are, when the layout is flattened."""
        slab = len(routing.topk_idxs) * self.num_slots
        packed = list(accumulate(recv_count, initial=0))
        begins = packed if self.rows == "compact" else range(0, len(recv_count) * slab, slab)
        return [slice(begin, begin + num) for begin, num in zip(begins, recv_count, strict=False)]


class Slabs(NamedTuple):
    """What a dispatch returned on one rank."""

    x: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    recv_count: torch.Tensor
    handle: tuple


class Exact(NamedTuple):
    """What one rank must get back from one rank's experts, and how many rows make up each sum."""

    sums: reference.ReferenceCombine
    num_terms: torch.Tensor


def slab_faults(
    got: Sequence[Slabs], right: Sequence[oracle.ReferenceSlabs], form: Form, routing: Routing
) -> list[str]:
    """What differs from the oracle in what the ranks received."""
    return [
        f"rank {rank}: {name}: {fault}"
        for rank, (mine, wanted) in enumerate(zip(got, right, strict=True))
        for name, fault in _slab_faults(mine, wanted, form, routing)
        if fault
    ]


def sum_faults(
    got: Sequence[torch.Tensor],
    right: Sequence[Sequence[Exact]],
    *,
    partials: torch.dtype = torch.bfloat16,
    use_logfmt: bool = False,
) -> list[str]:
    """What is not a correctly rounded sum; `right` as `exact_sums` gives it."""
    bound = LOGFMT_DIFF_BOUND if use_logfmt else DIFF_BOUNDS["bf16"]
    faults = []
    for rank, (mine, parts) in enumerate(zip(got, right, strict=True)):
        limits = allowed(parts, partials=partials, use_logfmt=use_logfmt)
        total = sum(part.sums.combined for part in parts)
        found = outside(mine, *limits) or diff_fault(mine, total, bound)
        faults += [f"rank {rank}: {found}"] if found else []
    return faults


def identity_faults(
    got: Sequence[torch.Tensor],
    xs: Sequence[torch.Tensor],
    routing: Routing,
    weights: Sequence[torch.Tensor],
    *,
    form: str,
) -> list[str]:
    """How tokens differ from how they left, weighted, when experts change nothing."""
    faults = []
    for rank, (mine, x) in enumerate(zip(got, xs, strict=True)):
        chosen = routing.topk_idxs[rank] >= 0
        factor = weights[rank].double().masked_fill(~chosen, 0).sum(1, keepdim=True)
        fault = diff_fault(mine, x.double() * factor, DIFF_BOUNDS[form])
        faults += [f"rank {rank}: {fault}"] if fault else []
    return faults


def exact_sums(
    rows: Sequence[Sequence[torch.Tensor]], routing: Routing, weights: Sequence[torch.Tensor]
) -> list[list[Exact]]:
    """What every rank must get back from every rank: the oracle is asked once for each of those.

    Args:
        rows: of every rank and local expert what it answers, as `oracle.combine` takes it.
        routing: the choices.
        weights: of every rank [T, K].
    """
    num_local = routing.num_experts // len(rows)
    exact: list[list[Exact]] = [[] for _ in rows]
    for peer in range(len(rows)):
        theirs = [torch.where(idx // num_local == peer, idx, -1) for idx in routing.topk_idxs]
        sums = oracle.combine(rows, theirs, weights, num_experts=routing.num_experts)
        for rank, (each, idx) in enumerate(zip(sums, theirs, strict=True)):
            exact[rank].append(Exact(each, (idx >= 0).sum(1)))
    return exact


def allowed(
    parts: Sequence[Exact], *, partials: torch.dtype, use_logfmt: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the greatest value [T, H] that may come back, in float32.

    Of n weighted rows every one goes through a multiplication and at most n - 1 additions in
    float32; then their sum is rounded to `partials`. From there on it is known what happens: the
    sums are added in float32, rank by rank, and rounded to bfloat16. Neither changes an order, so
    the limits may go the same way.
    """
    limits = [torch.zeros(parts[0].sums.combined.shape) for _ in range(2)]
    for sums, num_terms in parts:
        error = num_terms[:, None] * (_HALF_ULP * sums.magnitude + _TINY)
        ends = [(sums.combined + step).float().to(partials) for step in (-error, error)]
        if use_logfmt:
            ends = _in_ten_bits(*(end.double() for end in ends))
        limits = [limit + end.float() for limit, end in zip(limits, ends, strict=True)]
    low, high = (limit.bfloat16().float() for limit in limits)
    return low, high


def _in_ten_bits(low: torch.Tensor, high: torch.Tensor) -> list[torch.Tensor]:
    """Between what the sums may lie after they travelled in ten bits a value."""
    size = torch.maximum(low.abs(), high.abs())
    largest = size.amax(1, keepdim=True) if size.numel() else size
    slack = _LOGFMT_RELATIVE * size + _LOGFMT_ABSOLUTE * largest
    return [low - slack, high + slack]


def outside(mine: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> str:
    """Where a result is not between its limits; NaN is between none."""
    if mine.dtype != torch.bfloat16 or mine.shape != low.shape:
        return f"combined: {describe(mine)}, not {describe(low.bfloat16())}"
    wrong = (~((low <= mine) & (mine <= high))).nonzero()
    if not len(wrong):
        return ""
    where = tuple(wrong[0].tolist())
    limits = f"between {low[where].item()} and {high[where].item()}"
    return f"combined: {len(wrong)} elements, first {where}: {mine[where].item()}, not {limits}"


def diff_fault(mine: torch.Tensor, exact: torch.Tensor, bound: float) -> str:
    """Whether two results are too far apart as a whole; one is added to every element first."""
    if mine.shape != exact.shape:
        return f"combined: {describe(mine)}, not {list(exact.shape)}"
    diff = reference.calc_diff(mine.double() + 1, exact + 1)
    return "" if diff < bound else f"combined: calc_diff {diff}, not below {bound}"


def _slab_faults(
    got: Slabs, right: oracle.ReferenceSlabs, form: Form, routing: Routing
) -> Iterator[tuple[str, str]]:
    payload, scales = got.x if isinstance(got.x, tuple) else (got.x, None)
    shape, places = form.shape(routing), form.places(right.recv_count, routing)
    counts = torch.tensor(right.recv_count, dtype=torch.int32)
    yield "recv_count", difference(got.recv_count, counts)
    src_info, layout_range, *sizes, packed_recv_count = got.handle
    told, numbers = tuple(sizes), (form.num_slots, form.hidden, routing.num_experts)
    yield "handle[2:5]", "" if told == numbers else f"{told}, not {numbers}"
    yield "handle[5]", difference(packed_recv_count, counts)
    yield "layout_range", difference(layout_range, _layout_range(right))
    wanted = _src_info(right, shape, places)
    defined = src_info if wanted.shape != src_info.shape else src_info.where(wanted >= 0, wanted)
    yield "src_info", difference(defined, wanted)
    yield from _plane_faults("rows", payload, right.rows, shape, places)
    if scales is None or right.scales is None:
        yield "scales", "" if scales is right.scales else f"{describe(scales)} in {form.name}"
        return
    yield from _plane_faults("scales", scales, right.scales, shape, places)
    yield "scales", _stride_fault(scales, shape)


def _layout_range(right: oracle.ReferenceSlabs) -> torch.Tensor:
    packed = [[(begin << 32) | count for begin, count in each] for each in right.layout_range]
    return torch.tensor(packed, dtype=torch.int64)


def _src_info(
    right: oracle.ReferenceSlabs, shape: tuple[int, ...], places: Sequence[slice]
) -> torch.Tensor:
    wanted = torch.full((math.prod(shape),), -1, dtype=torch.int32)
    for tokens, place in zip(right.src_info, places, strict=True):
        wanted[place] = torch.tensor(tokens, dtype=torch.int32)
    return wanted.view(shape)


def _plane_faults(
    name: str,
    plane: torch.Tensor,
    right: Sequence[torch.Tensor],
    shape: tuple[int, ...],
    places: Sequence[slice],
) -> Iterator[tuple[str, str]]:
    """What is wrong with rows or scales: of all experts, or else of each."""
    wanted = (*shape, *right[0].shape[1:])
    if plane.dtype != right[0].dtype or plane.shape != wanted:
        yield name, f"{describe(plane)}, not {right[0].dtype} {list(wanted)}"
        return
    flat = plane.clone(memory_format=torch.contiguous_format).flatten(0, len(shape) - 1)
    for expert, (rows, place) in enumerate(zip(right, places, strict=True)):
        yield f"expert {expert}: {name}", difference(flat[place], rows)


def _stride_fault(scales: torch.Tensor, shape: tuple[int, ...]) -> str:
    """Several scales of a row are as far from each other as there are rows; rows are neighbours."""
    turned = scales if scales.dim() == len(shape) else scales.transpose(-1, -2)
    return "" if turned.is_contiguous() else f"strides {scales.stride()} of {list(scales.shape)}"
