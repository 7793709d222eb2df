"""Low-latency rows that stay where they land, on a device: what the two kernels are launched with.

The same verbs as `crossdock.low_latency_views`, and the same results. Rows are views of the heap;
so is what a combine without a copy takes: the ranks read it from each other.

T tokens here, K top-k, H hidden, R ranks, M slots for the tokens of a rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple
from weakref import ref

import torch

from crossdock.device.constants import aligned
from crossdock.device.engine import Engine
from crossdock.device.expert_kernels import (
    NOTED,
    PIECE,
    CombinePlan,
    CombineShape,
    DispatchPlan,
    DispatchShape,
    plan_combine,
    plan_dispatch,
)
from crossdock.device.memory import Generation
from crossdock.device.operands import (
    address_of,
    check_operands,
    show,
    then_copy,
    tokens_at,
    unreachable,
    writable,
)
from crossdock.device.watch import State
from crossdock.errors import HandleError
from crossdock.ops.triton import expert_records, expert_sums
from crossdock.routing import Selection
from crossdock.transports.header import Operation
from crossdock.transports.session import Receive
from crossdock.verbs import CombineKind, DispatchKind, LowLatencyViews, Stats

__all__ = ["REMEMBERED", "DeviceViews"]

REMEMBERED = 1024
"""Kinds of calls that are remembered."""


class _Room(NamedTuple):
    """Where the caller writes what goes back: of which views, in which heap and turn, and where."""

    views: Callable[[], torch.Tensor | None]
    memory: Callable[[], Generation | None]
    turn: int
    rows: torch.Tensor


class DeviceViews:
    """The calls of views of one buffer, and what all its low-latency calls share.

    Args:
        engine: launches kernels.
        partials: dtype of the sums that travel back: bfloat16 or float32.
    """

    def __init__(self, engine: Engine, *, partials: torch.dtype) -> None:
        self._engine = engine
        self._partials = partials
        self._room: _Room | None = None
        self._dispatch_plan = functools.cache(self._plan_dispatch)
        self._combine_plan = functools.cache(self._plan_combine)
        self._view_plans = functools.lru_cache(REMEMBERED)(self._plan_views)
        self._return_plans = functools.lru_cache(REMEMBERED)(self._plan_return)

    def _plan_dispatch(self, shape: DispatchShape) -> DispatchPlan:
        engine = self._engine
        back_bytes = shape.hidden * self._partials.itemsize
        return plan_dispatch(
            shape, engine.slack_group, back_bytes=back_bytes, use_casts=engine.use_casts
        )

    def _plan_combine(self, shape: CombineShape) -> CombinePlan:
        return plan_combine(shape, self._engine.slack_group, partials=self._partials)

    def _plan_views(self, kind: DispatchKind) -> tuple[DispatchPlan, expert_records.Call, str]:
        """How dispatches of a kind are launched, and why they cannot be, if so."""
        engine, most = self._engine, self._engine.num_programs
        plan = self._dispatch_plan(
            DispatchShape(
                kind.form,
                kind.hidden,
                kind.num_topk,
                kind.num_slots,
                kind.num_experts,
                kind.topk_weights is not None,
                compact=False,
                counts_waits=kind.waits is not None,
                counts_rows=False,
                checked=engine.debugs,
                viewed=True,
            )
        )
        senders = max(min(kind.num_tokens, 4 * most), 1)
        notes = engine.num_ranks * -(-kind.num_slots // NOTED)
        call = expert_records.Call(kind.num_tokens, kind.num_slots, senders, min(notes, most))
        others = (kind.topk_idx, kind.topk_weights, kind.waits)
        return plan, call, unreachable(kind.x, others, engine)

    def dispatch_views(
        self,
        x: torch.Tensor,
        selection: Selection,
        kind: DispatchKind,
        *,
        stats: Stats,
        hooked: bool,
    ) -> tuple[LowLatencyViews, Receive | None]:
        """See `LowLatency.dispatch_views`."""
        engine, x, (idx, weights) = self._engine, aligned(x), selection
        with engine.session.flight(Operation.LOW_LATENCY_DISPATCH) as attempt:
            plan, call, trouble = self._view_plans(kind)
            engine.begin(attempt)
            check_operands(trouble, stats)
            memory = engine.memory(plan.capacity)
            zone = memory.next_zone(0)
            landing = memory.plan.zones[zone]
            views = _views(memory, landing.landing, plan, kind=kind, num_ranks=engine.num_ranks)
            receive = plan.kernel.launch_halves(
                (2 + call.num_senders, 1 + plan.num_timers + call.num_placers),
                (
                    tokens_at(x, idx, weights),
                    expert_records.LandedViews(
                        views.src_idx.data_ptr(),
                        views.topk_idx.data_ptr(),
                        address_of(views.topk_weights),
                        address_of(stats.waits),
                    ),
                    engine.link(memory, attempt.call, State.LOW_LATENCY_DISPATCH + zone),
                    landing,
                    call,
                ),
                hooked=hooked,
            )
            if hooked:
                kept = (x, idx, weights, *views[1:4], *stats)
                receive = memory.hold_zone(0, zone, engine.resume(receive, kept))
        return views, engine.session.receive(attempt.call, receive, hooked=hooked)

    def _plan_return(self, kind: CombineKind) -> tuple[CombinePlan, expert_sums.ReturnCall, str]:
        """How combines of a kind are launched, and why they cannot be, if so."""
        engine, most = self._engine, self._engine.num_programs
        plan = self._combine_plan(
            CombineShape(
                kind.hidden,
                kind.num_topk,
                kind.num_slots,
                kind.num_experts,
                use_logfmt=False,
                knows_weights=True,
                counts_waits=kind.waits is not None,
                compact=False,
                x_is_compact=False,
                checked=engine.debugs,
                viewed=True,
                pulls=kind.pulls,
            )
        )
        pieces = 1 if engine.slack_group.can_shrink else -(-kind.hidden // PIECE)
        senders = max(min(kind.num_slots * engine.num_ranks, 16 * most), 1)
        reducers = max(min(kind.num_tokens * (pieces if kind.pulls else 1), 8 * most), 1)
        if kind.pulls:
            senders = 1
        call = expert_sums.ReturnCall(kind.num_tokens, kind.num_slots, senders, reducers)
        others = (kind.topk_idx, kind.src_info, kind.out, kind.waits)
        return plan, call, unreachable(kind.x, others, engine)

    def combine_views(
        self,
        x: torch.Tensor,
        selection: Selection,
        views: LowLatencyViews,
        *,
        kind: CombineKind,
        out: torch.Tensor,
        stats: Stats,
        hooked: bool,
    ) -> Receive | None:
        """See `LowLatency.combine_views`."""
        engine, idx, words = self._engine, selection.topk_idx, views.src_idx
        x, num_choices = x if kind.pulls else aligned(x), words.numel()
        with engine.session.flight(Operation.LOW_LATENCY_COMBINE) as attempt:
            if words.untyped_storage().nbytes() // 4 != num_choices + engine.num_ranks:
                raise HandleError("the views are a copy of what this buffer returned")
            plan, call, trouble = self._return_plans(kind)
            engine.begin(attempt)
            check_operands(trouble, stats)
            target, memory = writable(out), engine.memory(plan.capacity)
            if kind.pulls:
                self._check_room(memory)
            zone = memory.next_zone(1)
            receive = plan.kernel.launch_halves(
                (1 + call.num_senders, plan.num_timers + call.num_reducers),
                (
                    expert_sums.Chosen(
                        idx.data_ptr(), 0, target.data_ptr(), address_of(stats.waits)
                    ),
                    expert_sums.Returned(x.data_ptr(), 0, words.data_ptr(), 0, 0, num_choices),
                    engine.link(memory, attempt.call, State.LOW_LATENCY_COMBINE + zone),
                    memory.plan.returns[zone],
                    call,
                ),
                hooked=hooked,
            )
            if target is not out:
                receive = then_copy(receive, target, out)
            if hooked:
                kept = (idx, target, out, x, words, stats.waits)
                receive = memory.hold_zone(1, zone, engine.resume(receive, kept))
        return engine.session.receive(attempt.call, receive, hooked=hooked)

    def views_buffer(self, views: LowLatencyViews, hidden: int, *, make: bool) -> torch.Tensor:
        """See `LowLatency.views_buffer`."""
        if make:
            self._room = self._make_room(views, hidden)
        room = self._room
        if room is None or room.views() is not views.src_idx or room.rows.shape[2] != hidden:
            raise HandleError("zero_copy: nobody asked for this handle's combine buffer")
        return room.rows

    def _make_room(self, views: LowLatencyViews, hidden: int) -> _Room:
        """Room in the zone of the next combine, which nobody reads any more."""
        memory, (num_ranks, num_slots) = self._engine.generation, views.src_idx.shape
        nbytes = num_slots * hidden * torch.bfloat16.itemsize
        have = 0 if memory is None else memory.capacity.slots * memory.capacity.back_bytes
        if memory is None or nbytes > have or num_ranks != self._engine.num_ranks:
            raise HandleError("the handle is not one that this buffer returned")
        turn = memory.turns[1]
        zone = turn % len(memory.plan.returns)
        if memory.is_held(1, zone):
            raise HandleError("the combine before the last is in flight still: run its hook first")
        if memory.turns[0] == memory.read_at[zone]:
            raise HandleError("zero_copy: others may still read there, until the next dispatch")
        at, shape = memory.plan.returns[zone].landing, (num_ranks, num_slots, hidden)
        rows = show(memory, torch.bfloat16, shape, at=at, row=2 * hidden, slots=num_slots)
        return _Room(ref(views.src_idx), ref(memory), turn, rows)

    def _check_room(self, memory: Generation) -> None:
        """Raise `HandleError` unless this is the combine that room was made for, which it takes."""
        room, self._room = self._room, None
        if room is None or room.memory() is not memory or room.turn != memory.turns[1]:
            raise HandleError("zero_copy: the buffer was for the combine after it was asked for")
        memory.read_at[room.turn % len(memory.plan.returns)] = memory.turns[0]


def _views(
    memory: Generation, landing: int, plan: DispatchPlan, *, kind: DispatchKind, num_ranks: int
) -> LowLatencyViews:
    """The rows where they will land, and room for the rest."""
    form, row, layout, device = kind.form, plan.row, plan.layout, memory.own.device
    shape, empty = (num_ranks, kind.num_slots), torch.empty_strided
    num_slots, num_topk, row_bytes = kind.num_slots, kind.num_topk, row.stride
    tokens: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    tokens = payload = show(
        memory, form.element, (*shape, kind.hidden), at=landing, row=row_bytes, slots=num_slots
    )
    if layout.scale is not None and layout.scales is not None:
        at, of_row = landing + row.scales_at, (*shape, *layout.scales[2:])
        scales = show(memory, layout.scale, of_row, at=at, row=row_bytes, slots=num_slots)
        tokens = (payload, scales)
    choices, strides = (*shape, num_topk), (num_slots * num_topk, num_topk, 1)
    words = empty((num_ranks * num_slots + num_ranks,), (1,), dtype=torch.int32, device=device)
    weights = None
    if kind.topk_weights is not None:
        weights = empty(choices, strides, dtype=torch.float32, device=device)
    return LowLatencyViews(
        tokens,
        empty(choices, strides, dtype=torch.int64, device=device),
        weights,
        words.as_strided(shape, (num_slots, 1)),
        kind.num_experts,
    )
