"""High-throughput calls on a device: what the kernels are launched with.

The same verbs as `crossdock.exchange`, and the same results. The host waits once, for the number of
rows in a first dispatch with exact sizes; rows are on their way by then. Placing runs beside
sending, on a stream of its own.

T tokens here, K top-k, R ranks, L local experts, N received rows, C chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from crossdock.codec import AnyTokens, Tokens, join, row_format, split
from crossdock.config import align
from crossdock.device.constants import aligned
from crossdock.device.engine import Engine
from crossdock.device.memory import CHUNK, DeviceCapacity, Generation
from crossdock.device.rank_kernels import (
    addresses_received,
    addresses_sent,
    back_row,
    combine_kernel,
    place_kernel,
    rank_row,
    route_kernel,
    send_kernel,
    shares,
)
from crossdock.device.streams import Fork
from crossdock.device.watch import State
from crossdock.errors import BufferTooSmallError, HandleError, RankMismatchError, UnsupportedError
from crossdock.formats import RowFormat
from crossdock.handle import Handle
from crossdock.ops.triton import rank_routes, rank_rows, rank_sums
from crossdock.routing import RoutingShare
from crossdock.topology import num_local_experts
from crossdock.transports.header import Call, Operation
from crossdock.verbs import Combined, Dispatched, DispatchedAgain

__all__ = ["DeviceExchange"]


class _Trip(NamedTuple):
    """A dispatch on its way: what its kernels are told, and what must live as long."""

    planes: list[torch.Tensor]
    head: torch.Tensor
    num_rows_sent: torch.Tensor
    routing: RoutingShare | None
    row: rank_rows.RankRow
    sent: rank_rows.Sent
    memory: Generation
    call: Call
    num_tokens: int
    num_sms: int


class DeviceExchange:
    """The high-throughput verbs of one buffer. See `crossdock.exchange.Exchange`.

    Args:
        engine: launches kernels.
        reserve_tokens: tokens per rank to make room for from the start.
    """

    def __init__(self, engine: Engine, *, reserve_tokens: int = 0) -> None:
        self._engine = engine
        self._rank, self._num_ranks = engine.rank, engine.num_ranks
        self._reserve_tokens = reserve_tokens

    def dispatch(
        self,
        x: AnyTokens,
        routing: RoutingShare,
        *,
        alignment: int,
        num_worst_tokens: int,
        num_sms: int,
    ) -> Dispatched[AnyTokens]:
        """See `Exchange.dispatch`."""
        with self._engine.session.call(Operation.DISPATCH) as attempt:
            self._engine.begin()
            attempt.entered = True
            local = num_local_experts(routing.num_tokens_per_expert.shape[0], self._num_ranks)
            trip = self._begin(x, routing, attempt.call, local=local, num_sms=num_sms)
            prefix = trip.head.new_empty((self._num_ranks, self._num_ranks))
            chunks = self._empty_chunks(trip.memory, prefix)
            looks = not num_worst_tokens or not trip.memory.capacity.num_tokens
            told = self._route(
                trip, routing, prefix=prefix, chunks=chunks, alignment=alignment, is_read=looks
            )
            beside = self._engine.fork()
            if trip.num_tokens <= trip.memory.capacity.num_tokens:
                self._send(trip, beside)
            elif not looks:
                raise self._too_many(trip)
            num_rows, per_expert = num_worst_tokens, list[int]()
            if looks:
                words = self._engine.wait_for_host(told)
                trip, chunks = self._with_room(trip, words, chunks, beside=beside)
                num_rows = num_worst_tokens or words[2]
                per_expert = [] if num_worst_tokens else words[3 + self._num_ranks :]
            rows, idx, weights, src_idx = self._empty_rows(trip, x, routing, num_rows=num_rows)
            received = addresses_received(rows, (src_idx, prefix, chunks), idx=idx, weights=weights)
            self._place(trip, received, num_rows, pads=bool(num_worst_tokens))
            beside.join()
            handle = Handle(
                prefix,
                trip.num_rows_sent,
                chunks,
                src_idx,
                routing.is_token_in_rank,
                trip.head,
            )
            waits = [0] * self._num_ranks
            return Dispatched(join(rows, x), idx, weights, per_expert, handle, waits)

    def dispatch_again(
        self, x: AnyTokens, handle: Handle, *, num_sms: int
    ) -> DispatchedAgain[AnyTokens]:
        """See `Exchange.dispatch_again`."""
        with self._engine.session.call(Operation.CACHED_DISPATCH) as attempt:
            self._engine.begin()
            attempt.entered = True
            planes = [aligned(plane) for plane in split(x)]
            if planes[0].shape[0] != handle.num_tokens:
                tokens = planes[0].shape[0]
                raise HandleError(f"x has {tokens} tokens, the handle {handle.num_tokens}")
            row = rank_row(row_format(x), num_topk=0, has_weights=False, local=0)
            sent = addresses_sent(planes, handle.is_token_in_rank, (handle.send_head, handle[1]))
            memory = self._memory(row, row_format(x), 0)
            trip = _Trip(
                planes,
                handle.send_head,
                handle[1],
                None,
                row,
                sent,
                memory,
                attempt.call,
                handle.num_tokens,
                num_sms,
            )
            beside = self._engine.fork()
            self._send(trip, beside)
            num_rows = handle.num_recv_rows
            rows = [plane.new_empty((num_rows, plane.shape[1])) for plane in planes]
            src_idx, chunks = torch.empty_like(handle.recv_src_idx), handle[2]
            received = addresses_received(rows, (src_idx, handle.rank_prefix_matrix, chunks))
            self._place(trip, received, num_rows, pads=True)
            beside.join()
            return DispatchedAgain(join(rows, x), [0] * self._num_ranks)

    def combine(
        self,
        x: torch.Tensor,
        handle: Handle,
        *,
        topk_weights: torch.Tensor | None = None,
        bias: Sequence[torch.Tensor] = (),
        num_sms: int,
    ) -> Combined:
        """See `Exchange.combine`."""
        engine, x = self._engine, aligned(x)
        with engine.session.call(Operation.COMBINE) as attempt:
            engine.begin()
            attempt.entered = True
            if x.shape[0] != handle.num_recv_rows:
                raise HandleError(f"x has {x.shape[0]} rows, the handle {handle.num_recv_rows}")
            num_topk = 0 if topk_weights is None else topk_weights.shape[1]
            row = back_row(x.dtype, x.shape[1], num_topk=num_topk, num_bias=len(bias))
            memory = engine.memory(DeviceCapacity(sum_bytes=row.stride))
            out = x.new_empty((handle.num_tokens, x.shape[1]))
            weights = None
            if topk_weights is not None:
                topk_weights = topk_weights.detach().contiguous()
                weights = topk_weights.new_empty((handle.num_tokens, num_topk))
            rows = rank_sums.Rows(
                x.data_ptr(),
                (x if topk_weights is None else topk_weights).data_ptr(),
                handle.recv_src_idx.data_ptr(),
                handle.rank_prefix_matrix.data_ptr(),
                handle.recv_channel_prefix_matrix.data_ptr(),
            )
            terms = [aligned(term) for term in bias]
            sums = rank_sums.Sums(
                out.data_ptr(),
                (out if weights is None else weights).data_ptr(),
                (terms[0] if terms else x).data_ptr(),
                (terms[-1] if terms else x).data_ptr(),
                handle.send_head.data_ptr(),
            )
            call = _back_call(handle, memory, num_rows=x.shape[0], num_sms=num_sms)
            arguments = (
                rows,
                sums,
                engine.link(memory, attempt.call, State.COMBINE),
                memory.plan.back,
                call,
            )
            kernel = combine_kernel(row, engine.group)
            num_programs = call.num_senders + call.num_reducers
            kernel.launch(num_programs, arguments)
            return Combined(out, weights, [0] * self._num_ranks)

    def warmup(self, form: RowFormat, num_tokens: int) -> None:
        """See `Exchange.warmup`."""
        with self._engine.session.call(Operation.WARMUP) as attempt:
            attempt.entered = True
            row = rank_row(form, num_topk=0, has_weights=False, local=0)
            self._memory(row, form, 0, num_tokens=num_tokens)
            self._engine.meet()
        self._engine.session.settle_in()

    def check(self) -> None:
        """See `ExchangeCalls.check`."""
        self._engine.check()

    def _begin(
        self, x: Tokens, routing: RoutingShare, call: Call, *, local: int, num_sms: int
    ) -> _Trip:
        planes, form = [aligned(plane) for plane in split(x)], row_format(x)
        if planes[0].device.type not in self._engine.device_types:
            raise UnsupportedError(
                f"the device transport moves {self._engine.device_types} tensors, "
                f"x is on {planes[0].device}"
            )
        idx, weights = _contiguous(routing.topk_idx), _contiguous(routing.topk_weights)
        num_topk = 0 if idx is None else idx.shape[1]
        row = rank_row(form, num_topk=num_topk, has_weights=weights is not None, local=local)
        in_rank = routing.is_token_in_rank.contiguous()
        head = torch.empty(in_rank.shape, dtype=torch.int32, device=in_rank.device)
        num_sent = head.new_empty((self._num_ranks, 1))
        sent = addresses_sent(planes, in_rank, (head, num_sent), idx=idx, weights=weights)
        owned = RoutingShare(in_rank, routing.num_tokens_per_expert, idx, weights)
        memory = self._memory(row, form, local)
        return _Trip(
            planes, head, num_sent, owned, row, sent, memory, call, in_rank.shape[0], num_sms
        )

    def _memory(
        self, row: rank_rows.RankRow, form: RowFormat, local: int, *, num_tokens: int = 0
    ) -> Generation:
        """Room for a row of a call and of its combine."""
        back = form.hidden * max(2, min(form.element.itemsize, 4)) + 4 * row.num_topk
        return self._engine.memory(
            DeviceCapacity(
                num_tokens=max(self._reserve_tokens, num_tokens),
                token_bytes=row.stride,
                sum_bytes=align(back, 16) + 16,
                experts=local,
            )
        )

    def _too_many(self, trip: _Trip) -> BufferTooSmallError:
        have = trip.memory.capacity
        needed = have.covering(DeviceCapacity(num_tokens=trip.num_tokens))
        return BufferTooSmallError(
            self._engine.num_bytes(needed),
            trip.memory.plan.nbytes,
            argument="max_tokens_per_rank",
            rank=self._rank,
        )

    def _empty_chunks(self, memory: Generation, like: torch.Tensor) -> torch.Tensor:
        return like.new_empty((1 + memory.capacity.num_chunks, self._num_ranks, 2))

    def _route(
        self,
        trip: _Trip,
        routing: RoutingShare,
        *,
        prefix: torch.Tensor,
        chunks: torch.Tensor,
        alignment: int,
        is_read: bool,
    ) -> torch.Tensor:
        """Number this rank's rows and learn the others' counts; the host may look at the result."""
        engine, local = self._engine, trip.row.local
        told = engine.host_words(3 + self._num_ranks + local, is_read=is_read)
        per_expert = routing.num_tokens_per_expert.contiguous()
        received = addresses_received([], (prefix, prefix, chunks), idx=None, weights=None)
        fingerprint = hash((trip.row, alignment)) & 0x7FFFFFFF
        kernel = route_kernel(local, engine.group)
        arguments = (
            trip.sent,
            received,
            rank_routes.Learned(per_expert.data_ptr(), told.data_ptr(), alignment),
            engine.link(trip.memory, trip.call, State.ROUTE),
            trip.memory.plan.rows,
            _sent_call(trip, 0, fingerprint=fingerprint),
        )
        kernel.launch(self._num_ranks + 2, arguments)
        return told

    def _with_room(
        self, trip: _Trip, words: Sequence[int], chunks: torch.Tensor, *, beside: Fork
    ) -> tuple[_Trip, torch.Tensor]:
        """The trip in a heap that has room for the tokens of all ranks; enlarged, if need be."""
        prints = words[3 : 3 + self._num_ranks]
        if len(set(prints)) > 1:
            raise RankMismatchError("rows, top-k or experts", dict(enumerate(prints)))
        have, most = trip.memory.capacity.num_tokens, words[1]
        if most <= have:
            return trip, chunks
        roomy = align(most * 5 // 4 if have else most, CHUNK)
        memory = self._engine.memory(DeviceCapacity(num_tokens=roomy))
        larger = self._empty_chunks(memory, chunks)
        larger[0].copy_(chunks[0])
        trip = trip._replace(memory=memory)
        self._send(trip, beside)
        return trip, larger

    def _send(self, trip: _Trip, beside: Fork) -> None:
        engine, row = self._engine, trip.row
        programs = shares(trip.num_sms).senders
        programs = max(min(programs, -(-trip.num_tokens // row.chunk)), 1)
        arguments = (
            trip.sent,
            engine.link(trip.memory, trip.call, State.SEND),
            trip.memory.plan.rows,
            _sent_call(trip, programs),
        )
        with beside:
            send_kernel(row, engine.group).launch(programs, arguments)

    def _place(
        self, trip: _Trip, received: rank_rows.Received, num_rows: int, *, pads: bool
    ) -> None:
        engine, row = self._engine, trip.row
        programs = shares(trip.num_sms).others
        arguments = (
            trip.sent,
            received,
            engine.link(trip.memory, trip.call, State.PLACE),
            trip.memory.plan.rows,
            _sent_call(trip, programs, num_rows=num_rows),
        )
        kernel = place_kernel(row, engine.group, pads)
        kernel.launch(programs, arguments)

    def _empty_rows(
        self, trip: _Trip, x: Tokens, routing: RoutingShare, *, num_rows: int
    ) -> tuple[list[torch.Tensor], torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
        parts = x if isinstance(x, tuple) else (x,)
        rows = [part.new_empty((num_rows, part.shape[1])) for part in parts]
        idx = weights = None
        if routing.topk_idx is not None:
            shape, device = (num_rows, trip.row.num_topk), rows[0].device
            idx = torch.empty(shape, dtype=torch.int64, device=device)
            if routing.topk_weights is not None:
                weights = torch.empty(shape, dtype=torch.float32, device=device)
        return rows, idx, weights, trip.head.new_empty(num_rows)


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _sent_call(
    trip: _Trip, programs: int, *, num_rows: int = 0, fingerprint: int = 0
) -> rank_rows.SentCall:
    have = trip.memory.capacity
    return rank_rows.SentCall(
        trip.num_tokens, have.num_tokens, have.num_chunks, programs, num_rows, fingerprint
    )


def _back_call(
    handle: Handle, memory: Generation, *, num_rows: int, num_sms: int
) -> rank_sums.BackCall:
    have = memory.capacity
    senders, reducers = shares(num_sms, back=True)
    return rank_sums.BackCall(
        handle.num_tokens, have.num_tokens, have.num_chunks, num_rows, senders, reducers
    )
