"""Low-latency calls on a device: what the two kernels are launched with.

The same verbs as `crossdock.low_latency`, and the same results. The host neither waits nor looks at
a value of the device, so all of it can be captured in a graph. What calls of a kind have in common
is worked out at the first of them.

T tokens here, K top-k, H hidden, R ranks, L local experts, M slots for the tokens of a rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from crossdock.device.constants import aligned
from crossdock.device.engine import Engine
from crossdock.device.expert_kernels import (
    CombinePlan,
    CombineShape,
    DispatchPlan,
    DispatchShape,
    plan_combine,
    plan_dispatch,
)
from crossdock.device.launch import Launch
from crossdock.device.slabs import Extras
from crossdock.device.watch import State
from crossdock.errors import HandleError, UnsupportedError
from crossdock.formats import TokenFormat
from crossdock.handle import LowLatencyHandle
from crossdock.ops.triton import expert_records, expert_sums
from crossdock.routing import Selection
from crossdock.transports.header import Operation
from crossdock.transports.session import Receive
from crossdock.verbs import Slabs, Stats

__all__ = ["DeviceLowLatency"]


class DeviceLowLatency:
    """The low-latency verbs of one buffer. See `crossdock.low_latency.LowLatency`.

    Args:
        engine: launches kernels.
        partials: dtype of the sums that travel back: bfloat16 or float32.
    """

    def __init__(self, engine: Engine, *, partials: torch.dtype) -> None:
        self._engine = engine
        self._partials = partials
        self._buffers = WeakTensorKeyDictionary()
        self._dispatch_plan = functools.cache(self._plan_dispatch)
        self._combine_plan = functools.cache(self._plan_combine)

    def _plan_dispatch(self, shape: DispatchShape) -> DispatchPlan:
        engine = self._engine
        back_bytes = shape.hidden * self._partials.itemsize
        return plan_dispatch(
            shape, engine.slack_group, back_bytes=back_bytes, use_casts=engine.use_casts
        )

    def _plan_combine(self, shape: CombineShape) -> CombinePlan:
        return plan_combine(shape, self._engine.slack_group, partials=self._partials)

    def dispatch(
        self,
        x: torch.Tensor,
        selection: Selection,
        form: TokenFormat,
        *,
        num_slots: int,
        num_experts: int,
        compact: bool,
        stats: Stats,
        hooked: bool,
    ) -> Slabs:
        """See `LowLatency.dispatch`."""
        engine, x = self._engine, aligned(x)
        idx, weights = selection.topk_idx, selection.topk_weights
        plan = self._dispatch_plan(
            DispatchShape(
                form,
                x.shape[1],
                idx.shape[1],
                num_slots,
                num_experts,
                weights is not None,
                compact,
                stats.waits is not None,
                stats.received is not None,
            )
        )
        with engine.session.flight(Operation.LOW_LATENCY_DISPATCH) as attempt:
            engine.begin(attempt)
            _check(x, (idx, weights, *stats), engine)
            _check_dense(stats)
            memory = engine.memory(plan.capacity)
            payload, scales, handle = slabs = plan.layout.allocate(x.device)
            zone = memory.next_zone(0)
            weights = _or(weights, x)
            call = _dispatch_call(x.shape[0], num_slots, engine)
            launch = Launch(
                plan.kernel,
                (
                    _tokens(x, idx, weights),
                    _slabs(slabs, plan, stats),
                    engine.link(memory, attempt.call, State.LOW_LATENCY_DISPATCH + zone),
                    memory.plan.zones[zone],
                    call,
                ),
                (slabs, x, idx, weights, stats, memory),
            )
            receivers = 1 + plan.num_timers + call.num_placers
            receive = launch.run(2 + call.num_senders, receivers, hooked=hooked)
            if hooked:
                kept = (payload, scales, *handle[:2], handle[5], x, idx, weights, *stats)
                receive = memory.hold_zone(0, zone, engine.resume(receive, kept))
        left = engine.session.receive(attempt.call, receive, hooked=hooked)
        return Slabs(payload, scales, handle, left)

    def combine(
        self,
        x: torch.Tensor,
        selection: Selection,
        handle: LowLatencyHandle,
        *,
        use_logfmt: bool,
        out: torch.Tensor,
        stats: Stats,
        hooked: bool,
    ) -> Receive | None:
        """See `LowLatency.combine`."""
        engine, x = self._engine, aligned(x)
        idx, weights, words = selection.topk_idx, selection.topk_weights, handle.src_info
        (num_tokens, num_topk), waits = idx.shape, stats.waits
        extras = Extras.of_handle(handle, num_topk)
        with engine.session.flight(Operation.LOW_LATENCY_COMBINE) as attempt:
            engine.begin(attempt)
            _check(x, (idx, weights, words, out, waits), engine)
            _check_dense(stats)
            target = _writable(out)
            plan = self._combine_plan(
                CombineShape(
                    handle.hidden,
                    num_topk,
                    handle.num_max_dispatch_tokens_per_rank,
                    handle.num_experts,
                    use_logfmt,
                    extras.has_weights,
                    waits is not None,
                    handle.is_compact,
                    x.dim() == 2,
                )
            )
            memory = engine.memory(plan.capacity)
            zone = memory.next_zone(1)
            call = _combine_call(num_tokens, handle.num_max_dispatch_tokens_per_rank, engine)
            weights, waits = _or(weights, x), _or(waits, x)
            launch = Launch(
                plan.kernel,
                (
                    expert_sums.Chosen(
                        idx.data_ptr(), weights.data_ptr(), target.data_ptr(), waits.data_ptr()
                    ),
                    expert_sums.Returned(
                        x.data_ptr(), handle.layout_range.data_ptr(), words.data_ptr(), *extras[:3]
                    ),
                    engine.link(memory, attempt.call, State.LOW_LATENCY_COMBINE + zone),
                    memory.plan.returns[zone],
                    call,
                ),
                (idx, weights, target, x, words, handle.layout_range, waits, memory),
            )
            receivers = plan.num_timers + call.num_reducers
            senders = 1 + plan.num_tellers + call.num_senders
            receive = launch.run(senders, receivers, hooked=hooked)
            if target is not out:
                receive = _then_copy(receive, target, out)
            if hooked:
                kept = (idx, weights, target, out, x, words, handle.layout_range, waits)
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


def _check(x: torch.Tensor, others: Sequence[torch.Tensor | None], engine: Engine) -> None:
    """Raise `UnsupportedError` for tensors that kernels here cannot reach, or write to."""
    if x.device.type not in engine.device_types:
        raise UnsupportedError(
            f"the device transport moves {engine.device_types} tensors, x is on {x.device}"
        )
    for other in others:
        if other is not None and other.device != x.device:
            raise UnsupportedError(f"x is on {x.device}, another argument on {other.device}")


def _check_dense(stats: Stats) -> None:
    """Raise `UnsupportedError` for statistics that kernels would write to as if dense."""
    for counted in stats:
        if counted is not None and not counted.is_contiguous():
            raise UnsupportedError("the device transport counts in contiguous tensors alone")


def _tokens(x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> expert_records.Tokens:
    address = x.data_ptr()
    return expert_records.Tokens(address, address, idx.data_ptr(), weights.data_ptr())


def _slabs(
    made: tuple[torch.Tensor, torch.Tensor | None, LowLatencyHandle],
    plan: DispatchPlan,
    stats: Stats,
) -> expert_records.Slabs:
    """What the kernel is told of the results."""
    payload, scales, handle = made
    info = handle.src_info
    return expert_records.Slabs(
        payload.data_ptr(),
        _or(scales, payload).data_ptr(),
        info.data_ptr(),
        handle.layout_range.data_ptr(),
        handle.packed_recv_count.data_ptr(),
        _or(stats.waits, info).data_ptr(),
        _or(stats.received, info).data_ptr(),
        *plan.numbers,
    )


def _writable(out: torch.Tensor) -> torch.Tensor:
    """The tensor, or one in its place where kernels cannot write to it."""
    fits = out.is_contiguous() and out.data_ptr() % 16 == 0
    return out if fits else torch.empty(out.shape, dtype=out.dtype, device=out.device)


def _then_copy(
    receive: Callable[[], None], source: torch.Tensor, out: torch.Tensor
) -> Callable[[], None]:
    def run() -> None:
        receive()
        out.copy_(source)

    return run


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A tensor, or in its place one that will not be looked at."""
    return other if tensor is None else tensor


def _dispatch_call(num_tokens: int, num_slots: int, engine: Engine) -> expert_records.Call:
    """A program for each token to send, and one for each row to place: they wait side by side."""
    most = engine.num_programs
    senders = max(min(num_tokens, most), 1)
    placers = max(min(num_tokens * engine.num_ranks, 4 * most), 1)
    return expert_records.Call(num_tokens, num_slots, senders, placers)


def _combine_call(num_tokens: int, num_slots: int, engine: Engine) -> expert_sums.ReturnCall:
    most = engine.num_programs
    senders = max(min(num_tokens * engine.num_ranks, 4 * most), 1)
    return expert_sums.ReturnCall(num_tokens, num_slots, senders, max(min(num_tokens, most), 1))
