"""Low-latency calls on a device: what the two kernels are launched with.

The same verbs as `crossdock.low_latency`, and the same results. The host neither waits nor looks at
a value of the device, so all of it can be captured in a graph. What calls of a kind have in common
is worked out at the first of them.

T tokens here, K top-k, H hidden, R ranks, L local experts, M slots for the tokens of a rank.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from crossdock.device.constants import aligned
from crossdock.device.engine import Engine
from crossdock.device.expert_kernels import (
    CombinePlan,
    CombineShape,
    DispatchPlan,
    DispatchShape,
)
from crossdock.device.low_latency_views import REMEMBERED, DeviceViews
from crossdock.device.operands import (
    address_of,
    check_operands,
    then_copy,
    tokens_at,
    unreachable,
    writable,
)
from crossdock.device.slabs import Extras
from crossdock.device.watch import State
from crossdock.errors import HandleError
from crossdock.handle import LowLatencyHandle
from crossdock.ops.triton import expert_records, expert_sums
from crossdock.routing import Selection
from crossdock.transports.header import Operation
from crossdock.transports.session import Receive
from crossdock.verbs import CombineKind, DispatchKind, Slabs, Stats

__all__ = ["DeviceLowLatency"]


class DeviceLowLatency(DeviceViews):
    """The low-latency verbs of one buffer. See `crossdock.low_latency.LowLatency`.

    Args:
        engine: launches kernels.
        partials: dtype of the sums that travel back: bfloat16 or float32.
    """

    def __init__(self, engine: Engine, *, partials: torch.dtype) -> None:
        super().__init__(engine, partials=partials)
        self._buffers = WeakTensorKeyDictionary()
        self._dispatches = functools.lru_cache(REMEMBERED)(self._prepare_dispatch)
        self._combines = functools.lru_cache(REMEMBERED)(self._prepare_combine)

    def _prepare_dispatch(self, kind: DispatchKind) -> _Dispatch:
        engine = self._engine
        plan = self._dispatch_plan(
            DispatchShape(
                kind.form,
                kind.hidden,
                kind.num_topk,
                kind.num_slots,
                kind.num_experts,
                kind.topk_weights is not None,
                kind.compact,
                kind.waits is not None,
                kind.received is not None,
                engine.debugs,
            )
        )
        others = (kind.topk_idx, kind.topk_weights, kind.waits, kind.received)
        call = _dispatch_call(kind.num_tokens, kind.num_slots, engine)
        return _Dispatch(
            plan,
            call,
            (2 + call.num_senders, 1 + plan.num_timers + call.num_placers),
            unreachable(kind.x, others, engine),
        )

    def dispatch(
        self,
        x: torch.Tensor,
        selection: Selection,
        kind: DispatchKind,
        *,
        stats: Stats,
        hooked: bool,
    ) -> Slabs:
        """See `LowLatency.dispatch`."""
        engine, x, (idx, weights) = self._engine, aligned(x), selection
        with engine.session.flight(Operation.LOW_LATENCY_DISPATCH) as attempt:
            made = self._dispatches(kind)
            plan = made.plan
            engine.begin(attempt)
            check_operands(made.trouble, stats)
            memory = engine.memory(plan.capacity)
            payload, scales, handle = slabs = plan.layout.allocate(x.device)
            zone = memory.next_zone(0)
            receive = plan.kernel.launch_halves(
                made.num_programs,
                (
                    tokens_at(x, idx, weights),
                    _slabs(slabs, plan, stats),
                    engine.link(memory, attempt.call, State.LOW_LATENCY_DISPATCH + zone),
                    memory.plan.zones[zone],
                    made.call,
                ),
                hooked=hooked,
            )
            if hooked:
                kept = (payload, scales, *handle[:2], handle[5], x, idx, weights, *stats)
                receive = memory.hold_zone(0, zone, engine.resume(receive, kept))
        left = engine.session.receive(attempt.call, receive, hooked=hooked)
        return Slabs(payload, scales, handle, left)

    def _prepare_combine(self, called: tuple[CombineKind, int]) -> _Combine:
        """For combines of a kind, with as many words behind `src_info`."""
        (kind, num_words), engine = called, self._engine
        num_choices = engine.num_ranks * kind.num_slots * kind.num_topk
        extras = Extras.found(kind.num_rows, num_choices, engine.num_ranks, num_words=num_words)
        if extras is None:
            raise HandleError("the handle is a copy, or topk_idx is not that of its dispatch")
        plan = self._combine_plan(
            CombineShape(
                kind.hidden,
                kind.num_topk,
                kind.num_slots,
                kind.num_experts,
                kind.use_logfmt,
                extras.has_weights,
                kind.waits is not None,
                kind.compact,
                kind.x_is_compact,
                engine.debugs,
            )
        )
        others = (kind.topk_idx, kind.topk_weights, kind.src_info, kind.out, kind.waits)
        call = _combine_call(kind.num_tokens, kind.num_slots, engine)
        return _Combine(
            plan,
            call,
            (1 + plan.num_tellers + call.num_senders, plan.num_timers + call.num_reducers),
            unreachable(kind.x, others, engine),
            extras[:3],
        )

    def combine(
        self,
        x: torch.Tensor,
        selection: Selection,
        handle: LowLatencyHandle,
        *,
        kind: CombineKind,
        out: torch.Tensor,
        stats: Stats,
        hooked: bool,
    ) -> Receive | None:
        """See `LowLatency.combine`."""
        engine, (idx, weights) = self._engine, selection
        words, layout_range, x = handle[0], handle[1], aligned(x)
        made = self._combines((kind, words.untyped_storage().nbytes() // 4))
        with engine.session.flight(Operation.LOW_LATENCY_COMBINE) as attempt:
            engine.begin(attempt)
            check_operands(made.trouble, stats)
            target = writable(out)
            memory = engine.memory(made.plan.capacity)
            zone = memory.next_zone(1)
            receive = made.plan.kernel.launch_halves(
                made.num_programs,
                (
                    expert_sums.Chosen(
                        idx.data_ptr(),
                        address_of(weights),
                        target.data_ptr(),
                        address_of(stats.waits),
                    ),
                    expert_sums.Returned(
                        x.data_ptr(), layout_range.data_ptr(), words.data_ptr(), *made.extras
                    ),
                    engine.link(memory, attempt.call, State.LOW_LATENCY_COMBINE + zone),
                    memory.plan.returns[zone],
                    made.call,
                ),
                hooked=hooked,
            )
            if target is not out:
                receive = then_copy(receive, target, out)
            if hooked:
                kept = (idx, weights, target, out, x, words, layout_range, stats.waits)
                receive = memory.hold_zone(1, zone, engine.resume(receive, kept))
        return engine.session.receive(attempt.call, receive, hooked=hooked)

    def combine_buffer(self, handle: LowLatencyHandle, *, make: bool) -> torch.Tensor:
        """See `LowLatency.combine_buffer`."""
        found: torch.Tensor | None = self._buffers.get(handle.src_info)
        if found is None and not make:
            raise HandleError("zero_copy: nobody asked for this handle's combine buffer")
        if found is None:
            rows = self._engine.num_ranks * handle.num_slots
            shape = (handle.layout_range.shape[0], rows, handle.hidden)
            found = torch.empty(shape, dtype=torch.bfloat16, device=handle.src_info.device)
            self._buffers[handle.src_info] = found
        return found


class _Dispatch(NamedTuple):
    """What dispatches of a kind are launched with.

    Attributes:
        plan: also for other numbers of tokens.
        call: as the kernel takes it.
        num_programs: of each half.
        trouble: why kernels cannot take such tensors; empty if they can.
    """

    plan: DispatchPlan
    call: expert_records.Call
    num_programs: tuple[int, int]
    trouble: str


class _Combine(NamedTuple):
    """What combines of a kind are launched with. See `_Dispatch`.

    Attributes:
        extras: the end of `expert_sums.Returned`, what lies where behind `src_info`.
    """

    plan: CombinePlan
    call: expert_sums.ReturnCall
    num_programs: tuple[int, int]
    trouble: str
    extras: tuple[int, ...]


def _slabs(
    made: tuple[torch.Tensor, torch.Tensor | None, LowLatencyHandle],
    plan: DispatchPlan,
    stats: Stats,
) -> expert_records.Slabs:
    """What the kernel is told of the results."""
    payload, scales, handle = made
    return expert_records.Slabs(
        payload.data_ptr(),
        address_of(scales),
        handle[0].data_ptr(),
        handle[1].data_ptr(),
        handle[5].data_ptr(),
        address_of(stats[0]),
        address_of(stats[1]),
        *plan.numbers,
    )


def _dispatch_call(num_tokens: int, num_slots: int, engine: Engine) -> expert_records.Call:
    """A program for each token to send, and one for each row to place, as long as there is room."""
    most = engine.num_programs
    senders = max(min(num_tokens, 2 * most), 1)
    placers = max(min(num_tokens * engine.num_ranks, 4 * most), 1)
    return expert_records.Call(num_tokens, num_slots, senders, placers)


def _combine_call(num_tokens: int, num_slots: int, engine: Engine) -> expert_sums.ReturnCall:
    most = engine.num_programs
    senders = max(min(num_tokens * engine.num_ranks, 16 * most), 1)
    reducers = max(min(num_tokens, 2 * most), 1)
    return expert_sums.ReturnCall(num_tokens, num_slots, senders, reducers)
