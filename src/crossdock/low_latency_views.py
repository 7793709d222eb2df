"""Low-latency rows that stay where they have landed, on the host: a slot for each token.

What comes back is one row for each (token, rank), which its rank has added up already.

T tokens here, K top-k, H hidden, R ranks, M slots for the tokens of a rank.
"""

from __future__ import annotations

import torch

from crossdock import layouts
from crossdock.codec import empty_scales
from crossdock.formats import RowFormat
from crossdock.low_latency_flights import OF_VIEWS, Flights, Memory, Placed, sum_up
from crossdock.routing import Selection, SelectionTable
from crossdock.transports.base import Shipment
from crossdock.transports.header import Operation
from crossdock.transports.session import Receive
from crossdock.verbs import CombineKind, DispatchKind, LowLatencyViews, Stats

__all__ = ["ViewFlights"]


class ViewFlights(Flights):
    """The calls of views. See `Flights`."""

    def dispatch_views(
        self,
        x: torch.Tensor,
        selection: Selection,
        kind: DispatchKind,
        *,
        stats: Stats,
        hooked: bool,
    ) -> tuple[LowLatencyViews, Receive | None]:
        """Send as `dispatch` does; what comes gets a slot for each token of its source.

        Args, Collective, Sync, Lifetime, Raises: as for `dispatch`.
        """
        selection = selection.owned()
        with self._session.flight(Operation.LOW_LATENCY_DISPATCH) as attempt:
            payload, scales, views = self._empty_views(kind, selection, like=x)
            routed, table, in_rank, landing = self._depart(attempt, x, selection, kind=kind)
        memory = Memory(selection, in_rank, routed.eras, attempt.call.sequence, None)
        self._memories[views.src_idx] = memory

        def receive() -> None:
            landed = landing.land(keep=True)
            rows = self._leave(views, table.without(landed.masked))
            self._place(landed, rows, payload, scales=scales, slab_rows=kind.num_slots)
            memory.received = True
            stats.add(landed.waited_after(routed))

        return views, self._session.receive(attempt.call, receive, hooked=hooked)

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
        """Sum what the ranks have for every token, unweighted; receive later.

        Args:
            x: [R, M, H] bf16, by source rank and token.
            selection: choices of this rank's tokens, as dispatched.
            views: of the dispatch.
            kind: what the arguments say besides.
            out: as for `combine`.
            stats: as for `combine`.
            hooked: as for `combine`.

        Collective, Sync, Lifetime: as `combine`.

        Raises: as `combine`.
        """
        selection = selection.owned()
        with self._session.checking(Operation.LOW_LATENCY_COMBINE):
            memory = self._known(views.src_idx)
            self._recall(views.src_idx, selection)
        row = RowFormat(self._partials, kind.hidden)
        with self._session.flight(Operation.LOW_LATENCY_COMBINE) as attempt:
            header = self._header(attempt, row, selection)._replace(
                num_slots=kind.num_slots,
                num_experts=kind.num_experts,
                checksum=memory.number,
                flags=OF_VIEWS,
                share_bytes=0,
            )
            routed = attempt.route(header, selection.topk_idx.new_empty(0).byte())
            gone = sorted(routed.masked | routed.lost_since(memory.eras, self._rank))
            is_here, in_rank = views.src_idx >= 0, memory.in_rank.clone()
            is_here[gone], in_rank[:, gone] = False, False
            num_back: list[int] = is_here.sum(1).tolist()
            rows = x.detach()[is_here].to(self._partials)
            counts = self._counts(num_back, in_rank.sum(0).tolist())
            sends = layouts.consecutive(num_back)
            landing = attempt.send(Shipment([rows], sends, counts, num_slots=kind.num_slots))

        def receive() -> None:
            landed = landing.land(keep=True)
            sum_up(landed, in_rank, out, hidden=0)
            stats.add(landed.waited_after(routed))

        return self._session.receive(attempt.call, receive, hooked=hooked)

    def views_buffer(self, views: LowLatencyViews, hidden: int, *, make: bool) -> torch.Tensor:
        """The same for rows that lie as those of views do: [R, M, H] bf16."""
        return self._combine_buffer(views.src_idx, (*views.src_idx.shape, hidden), make=make)

    def _empty_views(
        self, kind: DispatchKind, selection: Selection, *, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, LowLatencyViews]:
        """Room for payload and scales, which are also parts of the views, on `like`'s device."""
        device, shape = like.device, (self._num_ranks, kind.num_slots)
        payload = torch.empty((*shape, kind.hidden), dtype=kind.form.element, device=device)
        scales = empty_scales(kind.form, kind.hidden, shape=shape, device=device)
        weights = selection.topk_weights
        views = LowLatencyViews(
            payload if scales is None else (payload, scales),
            torch.full((*shape, kind.num_topk), -1, device=device),
            None if weights is None else weights.new_zeros((*shape, kind.num_topk)),
            torch.full(shape, -1, dtype=torch.int32, device=device),
            kind.num_experts,
        )
        return payload, scales, views

    def _leave(self, views: LowLatencyViews, table: SelectionTable) -> Placed:
        """Fill the views but for the rows, whose slots are those of their tokens."""
        local = table.local(self._rank, views.num_experts // self._num_ranks)
        here = (local >= 0).any(1)
        sources, tokens = table.src_rank[here], table.src_token[here]
        views.src_idx[sources, tokens] = tokens.int()
        views.topk_idx[sources, tokens] = local[here]
        if views.topk_weights is not None and table.topk_weights is not None:
            views.topk_weights[sources, tokens] = table.topk_weights[here]
        arrivals = layouts.arrivals(local, table)[here]
        return Placed(sources, arrivals, sources * views.src_idx.shape[1] + tokens)
