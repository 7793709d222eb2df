"""High-throughput calls on a device: what the kernels are launched with.

The same verbs as `crossdock.exchange`, and the same results. The host waits once, for the number of
rows in a first dispatch with exact sizes; rows are on their way by then. Sending runs beside
placing, on a stream of its own.

T tokens here, K top-k, R ranks, L local experts, N received rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from crossdock.codec import AnyTokens, Tokens, format_of, join, metas
from crossdock.config import Config
from crossdock.device.constants import aligned
from crossdock.device.engine import Engine
from crossdock.device.layout import device_layout
from crossdock.device.memory import Generation
from crossdock.device.rank_kernels import (
    CombineShape,
    DispatchPlan,
    DispatchShape,
    is_few,
    plan_combine,
    plan_dispatch,
    shares,
)
from crossdock.device.trips import Trip
from crossdock.device.watch import State
from crossdock.errors import (
    BufferTooSmallError,
    HandleError,
    RankMismatchError,
    TransportError,
    UnsupportedError,
)
from crossdock.formats import RowFormat
from crossdock.handle import Handle
from crossdock.ops.triton import rank_records
from crossdock.routing import DispatchLayout, RoutingShare, dispatch_layout
from crossdock.shapes import Meta, meta
from crossdock.topology import num_local_experts
from crossdock.transports.header import Operation
from crossdock.verbs import Combined, Dispatched, Stats, Views

__all__ = ["DeviceExchange"]

_REMEMBERED = 1024
"""Kinds of dispatches that are remembered."""


class _Kind(NamedTuple):
    """What dispatches that are made alike have in common.

    Attributes:
        x: metas of rows, and of scales if there are some.
        num_experts: E; 0 if an earlier call has told.
        topk_idx: meta.
        has_weights, pads, viewed, counts_waits, checked, num_tokens: see `DispatchShape`.
        config: knobs.
    """

    x: tuple[Meta, ...]
    num_experts: int
    topk_idx: Meta
    has_weights: bool
    counts_waits: bool
    pads: bool
    viewed: bool
    num_tokens: int
    config: Config
    checked: bool


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
        self._plan = functools.lru_cache(_REMEMBERED)(self._make_plan)

    def layout(self, topk_idx: torch.Tensor, num_experts: int) -> DispatchLayout:
        """See `Exchange.layout`."""
        is_here = topk_idx.device.type in self._engine.device_types
        count = device_layout if is_here else dispatch_layout
        return count(topk_idx, num_experts, self._num_ranks)

    def dispatch(
        self,
        x: AnyTokens,
        routing: RoutingShare,
        *,
        alignment: int,
        num_worst_tokens: int,
        config: Config,
        stats: Stats,
    ) -> Dispatched[AnyTokens]:
        """See `Exchange.dispatch`."""
        engine, pads = self._engine, bool(num_worst_tokens)
        with engine.session.call(Operation.DISPATCH) as attempt:
            engine.begin(attempt)
            trip = Trip(
                engine,
                attempt.call,
                self._plan(self._kind(x, routing, stats, pads=pads, config=config)),
                x=x,
                routing=routing,
                waits=stats.waits,
                config=config,
            )
            looks = not pads or not trip.memory.capacity.num_tokens
            if looks:
                engine.check_may_wait()
            elif not trip.has_room:
                attempt.entered = False  # the others cannot know
                raise trip.too_many()
            with engine.beside:
                if trip.has_room:
                    trip.send()
                told = trip.route(routing.num_tokens_per_expert, alignment=alignment, is_read=looks)
                num_rows, per_expert = num_worst_tokens, list[int]()
                if looks:
                    words = engine.wait_for_host(told)
                    self._see_to_room(trip, words)
                    num_rows = num_worst_tokens or words[2]
                    per_expert = [] if pads else _per_expert(words, routing, self._num_ranks)
                rows, (idx, weights) = _empty_rows(x, num_rows), _empty_choices(routing, num_rows)
                src_idx = trip.place(rows, (num_rows,), idx=idx, weights=weights)
            return Dispatched(join(rows, x), idx, weights, per_expert, trip.handle(src_idx))

    def dispatch_again(
        self, x: AnyTokens, handle: Handle, *, config: Config, stats: Stats
    ) -> AnyTokens:
        """See `Exchange.dispatch_again`."""
        engine, handle = self._engine, _contiguous(handle)
        with engine.session.call(Operation.CACHED_DISPATCH) as attempt:
            engine.begin(attempt)
            trip = Trip(
                engine,
                attempt.call,
                self._plan(self._kind(x, None, stats, pads=True, config=config)),
                x=x,
                routing=RoutingShare(handle.is_token_in_rank, handle[1]),
                again=handle,
                waits=stats.waits,
                config=config,
            )
            if trip.num_tokens != handle.num_tokens:
                raise HandleError(f"x has {trip.num_tokens} tokens, the handle {handle.num_tokens}")
            if not trip.has_room:
                attempt.entered = False
                raise trip.too_many()
            with engine.beside:
                trip.send()
                rows = _empty_rows(x, handle.num_recv_rows)
                trip.place(rows, (handle.num_recv_rows,))
            return join(rows, x)

    def dispatch_views(
        self, x: AnyTokens, routing: RoutingShare, *, num_slots: int, config: Config, stats: Stats
    ) -> Views:
        """See `Exchange.dispatch_views`."""
        engine, shape = self._engine, (self._num_ranks, num_slots)
        with engine.session.call(Operation.DISPATCH) as attempt:
            engine.begin(attempt)
            trip = Trip(
                engine,
                attempt.call,
                self._plan(self._kind(x, routing, stats, viewed=num_slots, config=config)),
                x=x,
                routing=routing,
                waits=stats.waits,
                config=config,
            )
            with engine.beside:
                trip.send()
                trip.route(routing.num_tokens_per_expert, is_read=False)
                idx, weights = _empty_choices(routing, *shape)
                src_idx = trip.place([], shape, idx=idx, weights=weights)
            rows, num_rows = trip.views(num_slots)
            return Views(join(rows, x), idx, weights, num_rows, trip.handle(src_idx))

    def combine(
        self,
        x: torch.Tensor,
        handle: Handle,
        *,
        topk_weights: torch.Tensor | None = None,
        bias: Sequence[torch.Tensor] = (),
        config: Config,
        stats: Stats,
    ) -> Combined:
        """See `Exchange.combine`."""
        engine, x, weights = self._engine, aligned(x), topk_weights
        prefix, _, chunks, src_idx, _, head = handle = _contiguous(handle)
        with engine.session.call(Operation.COMBINE) as attempt:
            engine.begin(attempt)
            num_rows, hidden = x.shape
            if num_rows != handle.num_recv_rows:
                raise HandleError(f"x has {num_rows} rows, the handle {handle.num_recv_rows}")
            if chunks.dim() != 3 or chunks.shape[0] - 1 > engine.capacity.num_back_flags:
                raise HandleError("the handle is not of this buffer")
            num_topk = 0 if weights is None else weights.shape[1]
            counts_waits = self._counts_waits(stats)
            plan = plan_combine(
                CombineShape(
                    x.dtype,
                    hidden,
                    num_topk,
                    len(bias),
                    counts_waits,
                    is_few(shares(config.num_sms, senders=config.num_send_sms, back=True)),
                    engine.debugs,
                    config.tile_bytes,
                    engine.group,
                )
            )
            memory = engine.memory(plan.capacity)
            out, sums = x.new_empty((head.shape[0], hidden)), None
            if weights is not None:
                weights = weights.detach().contiguous()
                sums = weights.new_empty((head.shape[0], num_topk))
            terms = [aligned(term) for term in bias]
            rows = rank_records.Rows(
                x.data_ptr(),
                (x if weights is None else weights).data_ptr(),
                src_idx.data_ptr(),
                prefix.data_ptr(),
                chunks.data_ptr(),
            )
            summed = rank_records.Sums(
                out.data_ptr(),
                (out if sums is None else sums).data_ptr(),
                (terms[0] if terms else x).data_ptr(),
                (terms[-1] if terms else x).data_ptr(),
                head.data_ptr(),
                (x if stats.waits is None else stats.waits).data_ptr(),
            )
            call = _back_call(handle, memory, num_rows=num_rows, config=config)
            link = engine.link(memory, attempt.call, State.COMBINE)
            arguments = (rows, summed, link, memory.plan.back, call)
            num_programs = call.num_senders + plan.num_timers + call.num_reducers
            plan.kernel.launch(num_programs, arguments)
            return Combined(out, sums)

    def warmup(self, form: RowFormat, num_tokens: int) -> None:
        """See `Exchange.warmup`."""
        engine = self._engine
        with engine.session.call(Operation.WARMUP) as attempt:
            engine.begin(attempt)
            rows = (form.element, torch.Size((num_tokens, form.hidden)), engine.device)
            kind = (0, None, False, False, False, False, num_tokens, Config(), engine.debugs)
            plan = self._plan(_Kind((rows,), *kind))
            engine.memory(plan.capacity)
            engine.meet()
        engine.session.settle_in()

    def check(self) -> None:
        """See `ExchangeCalls.check`."""
        self._engine.inspect()

    def _kind(
        self,
        x: Tokens,
        routing: RoutingShare | None,
        stats: Stats,
        *,
        pads: bool = False,
        viewed: int = 0,
        config: Config,
    ) -> _Kind:
        """The kind of a dispatch; a cached one brings no choices. `viewed`: M, where rows stay."""
        counts_waits = self._counts_waits(stats)
        checked = self._engine.debugs
        common = (counts_waits, pads, bool(viewed), viewed, config, checked)
        if routing is None:
            return _Kind(metas(x), 0, None, False, *common)
        num_experts = routing.num_tokens_per_expert.shape[0]
        has_weights = routing.topk_weights is not None
        return _Kind(metas(x), num_experts, meta(routing.topk_idx), has_weights, *common)

    def _make_plan(self, kind: _Kind) -> DispatchPlan:
        """What dispatches of a kind need."""
        config, viewed = kind.config, kind.viewed
        return plan_dispatch(
            DispatchShape(
                form=format_of(kind.x),
                num_topk=0 if kind.topk_idx is None else kind.topk_idx[1][1],
                has_weights=kind.has_weights,
                local=kind.num_experts and num_local_experts(kind.num_experts, self._num_ranks),
                numbers=bool(kind.num_experts),
                pads=kind.pads,
                viewed=viewed,
                counts_waits=kind.counts_waits,
                few_programs=is_few(
                    shares(config.num_sms, senders=config.num_send_sms, viewed=viewed)
                ),
                checked=kind.checked,
                num_tokens=max(kind.num_tokens, self._reserve_tokens),
                tile_bytes=config.tile_bytes,
                group=self._engine.group,
            )
        )

    def _counts_waits(self, stats: Stats) -> bool:
        """Whether waits are counted, which kernels must be able to do."""
        waits = stats.waits
        if waits is not None and waits.device.type not in self._engine.device_types:
            able = self._engine.device_types
            raise UnsupportedError(f"wait_recv_cost_stats is on {waits.device}, x on {able}")
        return waits is not None

    def _see_to_room(self, trip: Trip, words: Sequence[int]) -> None:
        """Once the ranks agree, move on to a larger heap if some rank has too many tokens."""
        prints = words[3 : 3 + self._num_ranks]
        if len(set(prints)) > 1:
            error = RankMismatchError("rows, top-k or experts", dict(enumerate(prints)))
            # Rows are on their way that nobody places.
            self._engine.session.abandon(TransportError(f"an earlier dispatch failed: {error}"))
            raise error
        if words[1] > trip.memory.capacity.num_tokens:
            try:
                trip.enlarge(words[1])
            except BufferTooSmallError as error:
                if trip.memory.capacity.num_tokens:
                    # Those who had room have sent already.
                    told = f"an earlier dispatch failed: {error}"
                    self._engine.session.abandon(TransportError(told))
                raise
            trip.send()


def _contiguous(handle: Handle) -> Handle:
    """The handle, whose tensors a caller may have laid out anew."""
    return Handle(*(part.contiguous() for part in handle))


def _per_expert(words: Sequence[int], routing: RoutingShare, num_ranks: int) -> list[int]:
    """Rows for each expert here, of what the kernel has told the host."""
    begin, num_experts = 3 + num_ranks, routing.num_tokens_per_expert.shape[0]
    return list(words[begin : begin + num_experts // num_ranks])


def _empty_rows(x: Tokens, num_rows: int) -> list[torch.Tensor]:
    """Room for received rows."""
    parts = x if isinstance(x, tuple) else (x,)
    return [part.new_empty((num_rows, part.shape[1])) for part in parts]


def _empty_choices(
    routing: RoutingShare, *shape: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Room for the choices of received rows, where some were given."""
    idx, weights = routing.topk_idx, routing.topk_weights
    return (
        None if idx is None else idx.new_empty((*shape, idx.shape[1])),
        None if weights is None else weights.new_empty((*shape, weights.shape[1])),
    )


def _back_call(
    handle: Handle, memory: Generation, *, num_rows: int, config: Config
) -> rank_records.BackCall:
    have, table = memory.capacity, handle.recv_src_idx
    return rank_records.BackCall(
        handle.num_tokens,
        have.num_tokens,
        have.num_back_flags,
        num_rows,
        table.shape[1] if table.dim() == 2 else 0,
        *shares(config.num_sms, senders=config.num_send_sms, back=True),
    )
