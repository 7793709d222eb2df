"""Low-latency calls on a device: what the two kernels are launched with.

The same verbs as `crossdock.low_latency`, and the same results. The host neither waits nor looks at
a value of the device, so all of it can be captured in a graph. What combine needs beyond the handle
lies behind `src_info` in the same memory, so that it is there wherever the handle's tensors are.

T tokens here, K top-k, H hidden, R ranks, L local experts, M slots for the tokens of a rank,
A compact rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from crossdock.codec import empty_scales
from crossdock.config import align
from crossdock.device.constants import aligned
from crossdock.device.engine import Engine
from crossdock.device.expert_kernels import (
    CombineShape,
    DispatchShape,
    combine_kernel,
    dispatch_kernel,
)
from crossdock.device.launch import Launch
from crossdock.device.memory import DeviceCapacity
from crossdock.device.watch import State
from crossdock.errors import HandleError, UnsupportedError
from crossdock.formats import TokenFormat
from crossdock.handle import LowLatencyHandle
from crossdock.ops.triton import expert_records, expert_sums
from crossdock.routing import Selection
from crossdock.topology import num_local_experts
from crossdock.transports.header import Operation
from crossdock.transports.session import Receive
from crossdock.verbs import Slabs, Stats

__all__ = ["DeviceLowLatency"]

_NUM_ZONES = 2


class _Extras(NamedTuple):
    """What lies behind `src_info` in the same memory: offsets in words of 32 bits.

    Attributes:
        row_of, weights: [R, M, K]; without weights both are the same.
        num_sent: [R].
        num_words: of all.
    """

    row_of: int
    weights: int
    num_sent: int
    num_words: int

    @classmethod
    def of(cls, num_rows: int, num_choices: int, num_ranks: int, *, has_weights: bool) -> _Extras:
        """Behind `num_rows` rows and for R * M * K choices."""
        row_of = align(num_rows, 4)
        weights = row_of + num_choices * has_weights
        num_sent = weights + num_choices
        return cls(row_of, weights, num_sent, num_sent + num_ranks)

    @classmethod
    def of_handle(cls, handle: LowLatencyHandle, num_topk: int) -> _Extras:
        """What lies behind the `src_info` of a handle.

        Raises:
            HandleError: nothing, since it is a copy, or of calls with another top-k.
        """
        num_ranks, words = handle.layout_range.shape[1], handle.src_info
        num_choices = num_ranks * handle.num_slots * num_topk
        have = words.untyped_storage().nbytes() // 4
        for has_weights in (False, True):
            extras = cls.of(words.numel(), num_choices, num_ranks, has_weights=has_weights)
            if extras.num_words == have:
                return extras
        raise HandleError("the handle is a copy, or topk_idx is not that of its dispatch")

    @property
    def has_weights(self) -> bool:
        """Whether weights came with the rows."""
        return self.weights != self.row_of


class DeviceLowLatency:
    """The low-latency verbs of one buffer. See `crossdock.low_latency.LowLatency`.

    Args:
        engine: launches kernels.
        partials: dtype of the sums that travel back: bfloat16 or float32.
    """

    def __init__(self, engine: Engine, *, partials: torch.dtype) -> None:
        self._engine = engine
        self._partials = partials
        self._num_dispatches = 0
        self._num_combines = 0
        self._buffers = WeakTensorKeyDictionary()

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
        engine, num_topk, x = self._engine, selection.topk_idx.shape[1], aligned(x)
        with engine.session.flight(Operation.LOW_LATENCY_DISPATCH) as attempt:
            engine.begin()
            shape = DispatchShape(
                form,
                x.shape[1],
                num_topk,
                num_local_experts(num_experts, engine.num_ranks),
                engine.group,
                has_weights=selection.topk_weights is not None,
                compact=compact,
                counts_waits=stats.waits is not None,
                counts_rows=stats.received is not None,
                use_casts=engine.use_casts,
            )
            kernel, row, experts = dispatch_kernel(shape)
            back_bytes = align(x.shape[1] * self._partials.itemsize, 16)
            memory = engine.memory(
                DeviceCapacity(
                    slots=num_slots,
                    row_bytes=row.stride,
                    back_bytes=back_bytes,
                    topk=num_topk,
                    experts=experts.local,
                )
            )
            attempt.entered = True
            slabs = self._empty_slabs(form, x, num_slots=num_slots, experts=experts)
            payload, scales, handle = slabs
            zone = self._num_dispatches % _NUM_ZONES
            self._num_dispatches += 1
            idx, weights = selection.topk_idx, _or(selection.topk_weights, x)
            call = _dispatch_call(x.shape[0], num_slots, self._engine)
            address = x.data_ptr()
            launch = Launch(
                kernel,
                (
                    expert_records.Tokens(address, address, idx.data_ptr(), weights.data_ptr()),
                    _slabs(slabs, experts, stats),
                    engine.link(memory, attempt.call, State.LOW_LATENCY_DISPATCH + zone),
                    memory.plan.zones[zone],
                    call,
                ),
                (slabs, x, idx, weights, stats),
            )
            receive = launch.run(2 + call.num_senders, 1 + call.num_placers, hooked=hooked)
        done = engine.session.receive(attempt.call, receive)
        if not hooked:
            done()
        return Slabs(payload, scales, handle, done)

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
    ) -> Receive:
        """See `LowLatency.combine`."""
        if use_logfmt:
            raise UnsupportedError("use_logfmt: not on devices in this version")
        engine, (num_tokens, num_topk) = self._engine, selection.topk_idx.shape
        num_slots, x = handle.num_slots, aligned(x)
        extras = _Extras.of_handle(handle, num_topk)
        with engine.session.flight(Operation.LOW_LATENCY_COMBINE) as attempt:
            engine.begin()
            kernel, partial = combine_kernel(
                CombineShape(
                    handle.hidden,
                    num_topk,
                    handle.layout_range.shape[0],
                    engine.group,
                    is_float=self._partials is torch.float32,
                    knows_weights=extras.has_weights,
                )
            )
            memory = engine.memory(
                DeviceCapacity(
                    slots=num_slots,
                    back_bytes=partial.stride,
                    topk=num_topk,
                    experts=partial.local,
                )
            )
            attempt.entered = True
            zone = self._num_combines % _NUM_ZONES
            self._num_combines += 1
            call = _combine_call(num_tokens, num_slots, engine)
            idx, weights, words = selection.topk_idx, selection.topk_weights, handle.src_info
            weights = _or(weights, x)
            launch = Launch(
                kernel,
                (
                    expert_sums.Chosen(idx.data_ptr(), weights.data_ptr(), out.data_ptr()),
                    expert_sums.Returned(x.data_ptr(), words.data_ptr(), *extras[:3]),
                    engine.link(memory, attempt.call, State.LOW_LATENCY_COMBINE + zone),
                    memory.plan.returns[zone],
                    call,
                ),
                (idx, weights, out, x, words),
            )
            receive = launch.run(
                1 + partial.tellers + call.num_senders, call.num_reducers, hooked=hooked
            )
        done = engine.session.receive(attempt.call, receive)
        if not hooked:
            done()
        return done

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

    def _empty_slabs(
        self, form: TokenFormat, x: torch.Tensor, *, num_slots: int, experts: expert_records.Experts
    ) -> tuple[torch.Tensor, torch.Tensor | None, LowLatencyHandle]:
        """Room for what dispatch brings, not initialised."""
        num_ranks, hidden, device = self._engine.num_ranks, x.shape[1], x.device
        num_rows = num_ranks * num_slots
        compact_rows = num_rows * min(experts.num_topk, experts.local)
        shape = (compact_rows,) if experts.compact else (experts.local, num_rows)
        extras = _Extras.of(
            math.prod(shape),
            num_rows * experts.num_topk,
            num_ranks,
            has_weights=experts.has_weights,
        )
        words = torch.empty(extras.num_words, dtype=torch.int32, device=device)
        handle = LowLatencyHandle(
            words.as_strided(shape, (1,) if experts.compact else (num_rows, 1)),
            torch.empty((experts.local, num_ranks), dtype=torch.int64, device=device),
            num_slots,
            hidden,
            experts.local * num_ranks,
            torch.empty(experts.local, dtype=torch.int32, device=device),
        )
        payload = torch.empty((*shape, hidden), dtype=form.element, device=device)
        return payload, empty_scales(form, hidden, shape=shape, device=device), handle


def _slabs(
    made: tuple[torch.Tensor, torch.Tensor | None, LowLatencyHandle],
    experts: expert_records.Experts,
    stats: Stats,
) -> expert_records.Slabs:
    """What the kernel is told of the results."""
    payload, scales, handle = made
    extras = _Extras.of_handle(handle, experts.num_topk)
    strides = [0, 0, 0]
    if scales is not None:
        given = [*scales.stride(), *([] if scales.dim() == payload.dim() else [0])]
        strides = [0] * (3 - len(given)) + given
    info = handle.src_info
    return expert_records.Slabs(
        payload.data_ptr(),
        _or(scales, payload).data_ptr(),
        info.data_ptr(),
        handle.layout_range.data_ptr(),
        handle.packed_recv_count.data_ptr(),
        _or(stats.waits, info).data_ptr(),
        _or(stats.received, info).data_ptr(),
        *extras[:3],
        *strides,
    )


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A tensor, or in its place one that will not be looked at."""
    return other if tensor is None else tensor


def _dispatch_call(num_tokens: int, num_slots: int, engine: Engine) -> expert_records.Call:
    """A program for each token to send, and one for each row to place: they wait side by side."""
    most = engine.num_programs
    senders = max(min(num_tokens, most), 1)
    placers = max(min(num_tokens * engine.num_ranks, 4 * most), 1)
    return expert_records.Call(num_tokens, num_slots, senders, placers, fingerprint=num_slots)


def _combine_call(num_tokens: int, num_slots: int, engine: Engine) -> expert_sums.ReturnCall:
    most = engine.num_programs
    senders = max(min(num_tokens * engine.num_ranks, 4 * most), 1)
    return expert_sums.ReturnCall(num_tokens, num_slots, senders, max(min(num_tokens, most), 1))
