"""Dispatch and combine: where routing, codec, transport and layout meet, and nowhere else.

    dispatch:   route -> send -> land -> place
    combine:    gather -> send -> land -> reduce

Both are one `route` and one `move` of a transport; they differ in who counts the rows and what is
done with what has landed. Arguments arrive here as the public API checked them, results leave with
a handle. Names, defaults and events are the skin's matter.

T tokens here, K top-k, H hidden, R ranks, E experts, N rows received here.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence

import torch

from crossdock import layouts, ops
from crossdock.codec import AnyTokens, Tokens, join, row_format, split
from crossdock.config import Config
from crossdock.errors import HandleError, UnsupportedError
from crossdock.formats import RowFormat
from crossdock.handle import Handle
from crossdock.routing import (
    DispatchLayout,
    RoutingShare,
    RoutingTable,
    ShareShape,
    dispatch_layout,
)
from crossdock.topology import Topology, num_local_experts
from crossdock.transports.base import Routed, Shipment
from crossdock.transports.header import Header, Operation
from crossdock.transports.session import Attempt, Session
from crossdock.verbs import Combined, Dispatched, Stats, Views

__all__ = ["Exchange"]


class Exchange:
    """The verbs of one buffer, one call at a time.

    Args:
        topology: the group.
        session: numbers the calls and takes them to the transport.
        reserve_tokens: tokens per rank to make room for from the start.
    """

    def __init__(
        self,
        topology: Topology,
        session: Session,
        *,
        reserve_tokens: int = 0,
    ) -> None:
        self._rank, self._num_ranks = topology.rank, topology.num_ranks
        self._session = session
        self._reserve_tokens = reserve_tokens

    def layout(self, topk_idx: torch.Tensor, num_experts: int) -> DispatchLayout:
        """See `routing.dispatch_layout`. Collective: no. Sync: no. Lifetime: the caller's."""
        return dispatch_layout(topk_idx, num_experts, self._num_ranks)

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
        """Send every token to the ranks that want it.

        Args:
            x: [T, H] rows, or rows and scales.
            routing: where they go.
            alignment: multiple to which the counts per expert are rounded up.
            num_worst_tokens: rows of the result, whatever arrives; 0 for exactly what arrives.
            config: concerns devices.
            stats: where waits are added.

        Collective: all ranks, in the same order as all other calls of the buffer.
        Sync: returns when all rows have arrived.
        Lifetime: the result is the caller's.

        Raises: what `Transport.route` and `Transport.move` raise.
        """
        routing = routing.owned()
        num_experts = routing.num_tokens_per_expert.shape[0]
        experts_here = num_local_experts(num_experts, self._num_ranks)
        with self._session.call(Operation.DISPATCH) as attempt:
            form, planes, share = row_format(x), self._planes(x), routing.to_bytes()
            header = _dispatch_header(attempt, form, routing)._replace(share_bytes=share.numel())
            header = self._with_room(header, form, num_rows=num_worst_tokens)
            routed = attempt.route(header, share)
            table = _table(routed, routing, planes[0].device)
            layout = layouts.rank_major(table, self._rank)
            counts = layouts.counts_of_prefix(layout.rank_prefix_matrix)
            sends = layouts.send_tokens(routing.is_token_in_rank)
            landed = attempt.move(Shipment(planes, sends, counts), keep=not num_worst_tokens)
            stats.add(landed.waited_after(routed))
            rows = landed.packed
            if num_worst_tokens:
                rows = [ops.place(plane, num_worst_tokens) for plane in rows]
            num_rows = rows[0].shape[0]
            mine = layouts.local_selection(
                table, layout.table_rows, rank=self._rank, experts_here=experts_here
            ).padded(num_rows)
            per_expert = layouts.recv_counts_per_expert(
                table, rank=self._rank, experts_here=experts_here, alignment=alignment
            )
            return Dispatched(
                join(rows, x),
                mine.topk_idx,
                mine.topk_weights,
                [] if num_worst_tokens else per_expert,
                self._handle(layout, routing.is_token_in_rank, num_rows=num_rows),
            )

    def dispatch_again(
        self, x: AnyTokens, handle: Handle, *, config: Config, stats: Stats
    ) -> AnyTokens:
        """Send other rows the way an earlier dispatch went; routing is not exchanged again.

        Args:
            x: [T, H] rows, or rows and scales; T as in the earlier dispatch.
            handle: of that dispatch.
            config: concerns devices.
            stats: where waits are added.

        Collective, Sync, Lifetime: as `dispatch`.

        Raises:
            HandleError: the handle is of another number of tokens, or of another rank.
        """
        with self._session.call(Operation.CACHED_DISPATCH) as attempt:
            form, planes = row_format(x), self._planes(x)
            counts = self._checked_counts(handle, planes[0].shape[0])
            header = attempt.header(form, num_tokens=handle.num_tokens, checksum=_checksum(counts))
            routed = attempt.route(self._with_room(header, form, num_rows=handle.num_recv_rows))
            exact = sum(row[self._rank] for row in counts) == handle.num_recv_rows
            sends = layouts.send_tokens(handle.is_token_in_rank)
            landed = attempt.move(Shipment(planes, sends, counts), keep=exact)
            stats.add(landed.waited_after(routed))
            rows = landed.packed
            if not exact:
                rows = [ops.place(plane, handle.num_recv_rows) for plane in rows]
            return join(rows, x)

    def dispatch_views(
        self, x: AnyTokens, routing: RoutingShare, *, num_slots: int, config: Config, stats: Stats
    ) -> Views:
        """Send every token to the ranks that want it, into as many slots for each source.

        Args:
            x: [T, H] rows, or rows and scales.
            routing: where they go.
            num_slots: M, not below any rank's T.
            config: concerns devices.
            stats: where waits are added.

        Collective, Sync: as `dispatch`. Lifetime: here the result is the caller's.

        Raises: as `dispatch`.
        """
        done = self.dispatch(
            x, routing, alignment=1, num_worst_tokens=0, config=config, stats=stats
        )
        num_rows = done.handle.recv_channel_prefix_matrix[:, 0]
        slots = _slots_of(num_rows, num_slots)
        size = (self._num_ranks, num_slots)
        planes = [_spread(plane, slots, size) for plane in split(done.tokens)]
        idx, weights = done.topk_idx, done.topk_weights
        src_idx = _spread(done.handle.recv_src_idx, slots, size)
        return Views(
            join(planes, x),
            None if idx is None else _spread(idx, slots, size, fill=-1),
            None if weights is None else _spread(weights, slots, size),
            num_rows,
            done.handle._replace(recv_src_idx=src_idx),
        )

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
        """Bring one row per (token, rank) back and sum them: float32, in rank order, rounded once.

        Args:
            x: [N, H] rows in the order that dispatch returned them.
            handle: of that dispatch.
            topk_weights: [N, K] float32 to be summed alike; or None.
            bias: [T, H] tensors to add before rounding.
            config: concerns devices.
            stats: where waits are added.

        Collective, Sync, Lifetime: as `dispatch`.

        Raises:
            HandleError: the handle does not fit `x`, or belongs to another rank.
        """
        if handle.recv_src_idx.dim() == 2:
            num_rows = handle.recv_channel_prefix_matrix[:, 0]
            slots = _slots_of(num_rows, handle.recv_src_idx.shape[1])
            handle = handle._replace(recv_src_idx=handle.recv_src_idx.flatten()[slots])
            x = x[slots]
            topk_weights = None if topk_weights is None else topk_weights[slots]
        with self._session.call(Operation.COMBINE) as attempt:
            planes = self._planes(x if topk_weights is None else (x, topk_weights))
            counts = self._checked_counts(handle, handle.num_tokens)
            if planes[0].shape[0] != handle.num_recv_rows:
                raise HandleError(
                    f"x has {planes[0].shape[0]} rows, the handle {handle.num_recv_rows}"
                )
            header = _combine_header(attempt, planes, handle)._replace(checksum=_checksum(counts))
            routed = attempt.route(header)
            brought = [told.num_rows for told in routed.headers]
            kept = layouts.surviving_counts(counts, brought)
            sends = layouts.consecutive([row[self._rank] for row in kept])
            shipment = Shipment(planes, sends, layouts.transpose(kept))
            landed = attempt.move(shipment, keep=False)
            stats.add(landed.waited_after(routed))
            rows = landed.packed
            plan = layouts.reduce_plan(handle.send_head, kept[self._rank])
            sums = [
                ops.reduce(plane, plan.row_splits, plan.slots, bias=terms)
                for plane, terms in zip(rows, (bias, ()), strict=False)
            ]
            return Combined(sums[0], sums[1] if len(sums) > 1 else None)

    def warmup(self, form: RowFormat, num_tokens: int) -> None:
        """Make room for calls of this size, and wait until all ranks are here.

        Later calls have the steady deadline from their first use on.
        """
        with self._session.call(Operation.WARMUP) as attempt:
            header = attempt.header(form, num_tokens=num_tokens)
            attempt.route(self._with_room(header, form, num_rows=0))
            nothing = [[0] * self._num_ranks for _ in range(self._num_ranks)]
            attempt.move(Shipment([], [slice(0)] * self._num_ranks, nothing), keep=False)
        self._session.settle_in()

    def check(self) -> None:
        """See `ExchangeCalls.check`: here calls raise themselves."""

    def _handle(
        self, layout: layouts.RankMajor, is_token_in_rank: torch.Tensor, *, num_rows: int
    ) -> Handle:
        prefix = layout.rank_prefix_matrix
        received = prefix[:, self._rank].diff(prepend=prefix.new_zeros(1))
        return Handle(
            prefix,
            is_token_in_rank.sum(0, dtype=torch.int32).unsqueeze(1),
            received.unsqueeze(1),
            layouts.pad_rows(layout.recv_src_idx, num_rows, fill=0),
            is_token_in_rank.clone(),
            layouts.send_head_of(is_token_in_rank),
        )

    def _planes(self, x: Tokens) -> list[torch.Tensor]:
        """The planes of `x`, if the transport can move them."""
        planes = split(x)
        device, able = planes[0].device.type, self._session.transport.device_types
        if able and device not in able:
            name = self._session.transport.name
            raise UnsupportedError(f"the {name} transport moves {able} tensors, x is on {device}")
        return planes

    def _with_room(self, header: Header, form: RowFormat, *, num_rows: int) -> Header:
        """The header with what the transport must make room for: this call and its combine."""
        back = form.hidden * max(2, min(form.element.itemsize, 4)) + header.num_topk * 4
        return header._replace(
            num_rows=num_rows,
            row_bytes=form.row_bytes,
            return_bytes=back,
            reserve_tokens=self._reserve_tokens,
        )

    def _checked_counts(self, handle: Handle, num_tokens: int) -> layouts.Counts:
        """The counts in a handle, if it can be this rank's."""
        if num_tokens != handle.num_tokens:
            raise HandleError(f"x has {num_tokens} tokens, the handle {handle.num_tokens}")
        counts = layouts.counts_of_prefix(handle.rank_prefix_matrix)
        sent: list[int] = handle.is_token_in_rank.sum(0).tolist()
        if counts[self._rank] != sent:
            raise HandleError(f"the handle is not one of rank {self._rank}: it belongs to another")
        return counts


def _slots_of(num_rows: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Where rows lie that have as many slots for each source.

    Example: [2, 1] rows in 3 slots -> [0, 1, 3]
    """
    slot = torch.arange(num_slots, dtype=num_rows.dtype, device=num_rows.device)
    return (slot < num_rows.unsqueeze(1)).flatten().nonzero().flatten()


def _spread(
    rows: torch.Tensor, slots: torch.Tensor, size: tuple[int, int], *, fill: int = 0
) -> torch.Tensor:
    """The rows [N, ...] in their slots, [R, M, ...]."""
    spread = rows.new_full((size[0] * size[1], *rows.shape[1:]), fill)
    spread[slots] = rows
    return spread.view(*size, *rows.shape[1:])


def _dispatch_header(attempt: Attempt, form: RowFormat, routing: RoutingShare) -> Header:
    topk_idx, weights = routing.topk_idx, routing.topk_weights
    return attempt.header(
        form,
        num_tokens=routing.is_token_in_rank.shape[0],
        num_topk=0 if topk_idx is None else topk_idx.shape[1],
        num_experts=routing.num_tokens_per_expert.shape[0],
        flags=(topk_idx is not None) + 2 * (weights is not None),
    )


def _combine_header(attempt: Attempt, planes: Sequence[torch.Tensor], handle: Handle) -> Header:
    return attempt.header(
        row_format(planes[0]),
        num_tokens=handle.num_tokens,
        num_rows=planes[0].shape[0],
        num_topk=planes[1].shape[1] if len(planes) > 1 else 0,
        row_bytes=sum(plane.shape[1] * plane.dtype.itemsize for plane in planes),
    )


def _table(routed: Routed, routing: RoutingShare, device: torch.device) -> RoutingTable:
    shape = ShareShape(
        num_topk=0 if routing.topk_idx is None else routing.topk_idx.shape[1],
        has_topk=routing.topk_idx is not None,
        has_weights=routing.topk_weights is not None,
    )
    shares = [
        RoutingShare.from_bytes(
            raw.to(device),
            num_tokens=header.num_tokens,
            num_ranks=len(routed.headers),
            num_experts=routing.num_tokens_per_expert.shape[0],
            shape=shape,
        )
        for header, raw in zip(routed.headers, routed.shares, strict=True)
    ]
    return RoutingTable.from_shares(shares)


def _checksum(counts: layouts.Counts) -> int:
    """A number that differs for handles of different dispatches, with high probability."""
    return zlib.crc32(array("q", [count for row in counts for count in row]).tobytes()) + 1
